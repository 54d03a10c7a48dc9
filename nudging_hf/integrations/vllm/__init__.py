"""Nudging inside vLLM: its model is the base, and the nudging model lives in its worker.

`worker` has the worker classes for `--worker-cls`, `runner_v1` and `runner_v2` connect them with vLLM's two model
runners, `nudger` runs the nudging model, `params` reads what a request says, `middleware` answers bad requests with
400 and makes the nudging model's prompt from chat messages, `reports` carries what the worker knows of an answer to
the API server, `replies` adds it there, and `launch` writes vLLM's command line.
"""
