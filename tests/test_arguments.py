"""The typed keywords of `generate` are those that it takes, and a type checker sees a misspelt one."""

import os
import subprocess
import sys
from pathlib import Path

from transformers import GenerationConfig

from nudging_hf import NudgingConfig
from nudging_hf.core.arguments import GenerateArguments, NudgingParameters
from nudging_hf.core.validation import UNSUPPORTED

# Fields of a generation config that mean nothing without beams or an assistant model, or are not a caller's to set.
NOT_OF_A_CALL = set(
    """assistant_confidence_threshold assistant_lookbehind cache_config continuous_batching_config
    decoder_start_token_id early_stopping exponential_decay_length_penalty is_assistant length_penalty low_memory
    max_matching_ngram_size num_assistant_tokens num_assistant_tokens_schedule target_lookbehind
    transformers_version""".split()
)

PROGRAM = """
import nudging_hf
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("base")
nudging_hf.generate(model, nudging_model="nudging", nudge_threshold=0.4, max_new_tokens=20, stop_strings=["."])
nudging_hf.generate(model, nudging_model="nudging", nudge_treshold=0.4)
nudging_hf.generate(model, nudging_model="nudging", max_new_tokens="20")
"""


def test_every_field_of_a_generation_config_is_typed_or_refused():
    fields = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    assert fields <= set(GenerateArguments.__annotations__) | set(UNSUPPORTED) | NOT_OF_A_CALL


def test_the_parameters_are_those_of_the_config():
    assert tuple(NudgingParameters.__annotations__) == NudgingConfig.field_names()


def test_a_type_checker_sees_a_misspelt_keyword_and_a_wrong_type(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    root = Path(__file__).parents[1]
    checked = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", root / "setup.cfg", tmp_path / "program.py"],
        env={**os.environ, "MYPYPATH": str(root)},
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    wrong = [line for line in checked.stdout.splitlines() if "error:" in line]
    assert len(wrong) == 2, checked.stdout + checked.stderr
    assert '"nudge_treshold"' in wrong[0] and "program.py:7" in wrong[0]
    assert "program.py:8" in wrong[1]
