"""A server with OpenAI's API. `app` knows HTTP, `engine` what it asks of models, and `in_process` runs them."""
