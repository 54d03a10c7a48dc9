"""vLLM's workers with a nudging model, for `--worker-cls`.

    --worker-cls nudging_hf.integrations.vllm.worker.NudgingWorker       # on a GPU
    --worker-cls nudging_hf.integrations.vllm.worker.NudgingCPUWorker    # on a CPU

The classes are made when they are asked for, because each needs its own platform of vLLM.
"""

from __future__ import annotations

from typing import Any

from .checks import validate_config, validate_runner, validate_version
from .nudger import Nudger
from .params import base_arguments


class _Nudging:
    """What both workers add to vLLM's. The nudging model is loaded with the base, before vLLM measures its memory."""

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Loads the base, and then the nudging model."""
        import vllm

        worker: Any = self
        runner, config = worker.model_runner, worker.vllm_config
        validate_version(vllm.__version__)
        is_v2 = bool(getattr(config, "use_v2_model_runner", False))
        if is_v2:
            from .runner_v2 import METHOD, Connection
        else:
            from .runner_v1 import METHOD, Connection  # type: ignore[assignment]
        validate_config(config, METHOD)
        super().load_model(*args, **kwargs)  # type: ignore[misc]
        validate_runner(runner, is_v2)
        worker.connection = Connection(runner, _nudger(config, runner.device))

    def execute_model(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        """A step of the engine."""
        connection = getattr(self, "connection", None)
        if connection is not None:
            connection.begin_pass(scheduler_output)
        return super().execute_model(scheduler_output, *args, **kwargs)  # type: ignore[misc]


def _nudger(config: Any, device: Any) -> Nudger:
    from vllm.distributed import get_tp_group

    group, model = get_tp_group(), config.model_config
    more = {} if group.world_size == 1 else {"shared": lambda value: group.broadcast_object(value, src=0)}
    return Nudger(
        dict((config.additional_config or {}).get("nudging", {})),
        model.model,
        base_arguments(model),
        max_model_len=model.max_model_len,
        max_rows=config.scheduler_config.max_num_seqs,
        num_draft_tokens=config.speculative_config.num_speculative_tokens,
        device=device,
        rank=group.rank_in_group,
        **more,
    )


def __getattr__(name: str) -> Any:
    if name == "NudgingCPUWorker":
        from vllm.v1.worker.cpu_worker import CPUWorker as Worker
    elif name == "NudgingWorker":
        from vllm.v1.worker.gpu_worker import Worker
    else:
        raise AttributeError(name)
    # Its name is found by `pickle`, which passes workers to other processes.
    globals()[name] = type(name, (_Nudging, Worker), {"__module__": __name__, "__doc__": f"`{name}` for vLLM."})
    return globals()[name]
