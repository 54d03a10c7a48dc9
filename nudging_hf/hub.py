"""Code, model folders and uploads for the Hugging Face Hub. It knows files, never decoding."""

from __future__ import annotations

import copy
import json
import logging
import os
import shutil
import string
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.utils import DEFAULT_IGNORE_PATTERNS, filter_repo_objects, validate_repo_id  # type: ignore[attr-defined]
from transformers import GenerationConfig

from .chats import DEFAULT_TEMPLATE, turn_template
from .core.config import NudgingConfig
from .hub_card import common_licence, model_card, read_card
from .hub_readme import refresh_lists
from .pair import is_folder, load_model

logger = logging.getLogger(__name__)

CODE, NUDGING_MODEL = "custom_generate", "nudging_model"
# transformers reads lines of the form `name op version`, and of each only the first clause.
REQUIREMENTS = ("torch>=2.4", "transformers>=5.12")

_CORE = Path(__file__).parent / "core"
_NOT_KEPT = ("_from_model_config", "transformers_version")
# Fields that act on sampling alone, and fields that act on beams alone.
_SAMPLING_FIELDS = "temperature top_k top_p min_p top_h typical_p epsilon_cutoff eta_cutoff".split()
_BEAM_FIELDS = ["early_stopping", "length_penalty"]
_NOT_UPLOADED = ("*.pyc", "*.DS_Store", *DEFAULT_IGNORE_PATTERNS)


def carried_modules() -> list[Path]:
    """The files of the package that a Hub folder carries: the modules of `nudging_hf.core`."""
    return sorted(_CORE.glob("[!_]*.py"))


def write_code(folder: str | os.PathLike[str]) -> Path:
    """Writes `folder/custom_generate`: the code with which `folder` can be given as `custom_generate=`.

    The modules are the package's own, byte for byte. Modules that an earlier version left there are removed. If
    `folder/README.md` has lists of arguments and limits, as `hub_readme` marks them, they are brought up to date.

    Returns:
        The path of `custom_generate`.
    """
    code = Path(folder, CODE)
    code.mkdir(parents=True, exist_ok=True)
    for old in code.glob("*.py"):
        old.unlink()
    for module in carried_modules():
        shutil.copyfile(module, code / module.name)
    (code / "requirements.txt").write_text("".join(f"{line}\n" for line in REQUIREMENTS), encoding="utf-8")
    refresh_lists(Path(folder, "README.md"))
    return code


def export(
    base: str | os.PathLike[str],
    nudging_model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    base_template: str = DEFAULT_TEMPLATE,
    overwrite: bool = False,
    license: str | None = None,
    base_models: Sequence[str] | None = None,
    **parameters: Any,
) -> Path:
    r"""Writes a model folder that nudges by itself if it is loaded with `trust_remote_code=True`.

    The folder holds the base (safetensors, in the dtype in which it was saved), its tokenizer with a chat template
    that makes the base's plain prompt, the code, a generation config that names the nudging model and the given
    parameters, and a model card. A nudging model that is a folder is copied into it; one on the Hub is named.
    transformers does not save a generation config whose fields have no effect, such as a temperature without sampling.
    Such fields are left out, and a warning names them.

    Args:
        base: the large base model: a folder, or a name on the Hugging Face Hub.
        nudging_model: the small aligned model, likewise.
        out: the folder to be written.
        base_template: one turn of the base's prompt, as [`plain_prompt`] takes it.
        overwrite: whether `out` may be a model folder that exists; it is replaced after everything else is done.
        license: the licence of the weights, for the model card, such as "apache-2.0". If it is left out, it is what
            the cards of the models say whose weights the folder holds.
        base_models: names on the Hub of the models that this one is made of, for the model card. If they are left
            out, they are those that were given, and for folders what their own cards name.
        parameters: fields of [`NudgingConfig`] that the folder's generation config is to set.

    Returns:
        The path of the folder.

    Raises:
        ValueError: for models that cannot be loaded, weights that are not safetensors, a template or parameters out
            of range, and an `out` that would be lost.

    Example:
        ```python
        nudging_hf.hub.export("models/base", "models/nudging", "models/nudged", nudge_threshold=0.4)
        ```
    """
    out, base, nudging_model = Path(out).resolve(), os.fspath(base), os.fspath(nudging_model)
    NudgingConfig(**parameters)
    plain_chat_template(base_template)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if not overwrite:
            raise ValueError(
                f"{out} is there already: name another folder, or overwrite it (`overwrite=True`, `--overwrite`)."
            )
        if not (out / "config.json").is_file():
            raise ValueError(f"{out} is no model folder, and stays: only a model folder is overwritten.")
    copied = is_folder(nudging_model, "The nudging model")
    if not copied:
        validate_repo_id(nudging_model)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        made = Path(scratch, out.name)
        made.mkdir()
        named = f"./{NUDGING_MODEL}" if copied else nudging_model
        _save(base, "base", made, base_template, parameters | {"nudging_model_name_or_path": named})
        if copied:
            _save(nudging_model, "nudging model", made / NUDGING_MODEL)
        write_code(made)
        cards = [read_card(base), *([read_card(nudging_model)] if copied else [])]
        names = [*cards[0].names, *(cards[1].names if copied else [nudging_model])]
        licence = license or common_licence(cards)
        card = model_card(out.name, licence, base_models or names, named, parameters)
        (made / "README.md").write_text(card, encoding="utf-8")
        if out.exists():
            shutil.rmtree(out)
        made.rename(out)
    return out


def _save(
    name: str, whose: str, folder: Path, base_template: str | None = None, fields: dict[str, Any] | None = None
) -> None:
    """Saves a model with its weights as they were, and its tokenizer. On return nothing holds the weights any more.

    The chat template is made of `base_template`, or stays. The generation config gets the given fields.
    """
    _refuse_broken_generation_config(name, whose)
    model, tokenizer = load_model(name, f"The {whose}", dtype="auto", use_safetensors=True, trust_remote_code=False)
    # transformers did without their own code here, so it must not ask for that code when the folder is trusted.
    vars(model.config).pop("auto_map", None)
    tokenizer.init_kwargs.pop("auto_map", None)
    if fields is not None:
        # A fresh config: one that is marked as made from the model's loses fields of nudging when it is loaded.
        own = model.generation_config.to_dict()
        own = {key: value for key, value in own.items() if key not in _NOT_KEPT and value is not None}
        model.generation_config = GenerationConfig(**own | fields)
    model.generation_config = _savable(model.generation_config, name, whose)
    if base_template is not None:
        tokenizer.chat_template = plain_chat_template(base_template, _opening(tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _refuse_broken_generation_config(name: str, whose: str) -> None:
    """Refuses a config on which `from_pretrained` of a model fails without naming the file, or which it ignores."""
    try:
        GenerationConfig.from_pretrained(name)
    except (OSError, ValueError, TypeError) as error:
        if isinstance(error, OSError) and not Path(name, "generation_config.json").is_file():
            return  # The model has none, or cannot be reached, which shows when it is loaded.
        raise ValueError(
            f"The generation_config.json of the {whose} {name!r} is one that transformers does not read: "
            f"{' '.join(str(error).split())} Mend it there."
        ) from error


def _savable(config: GenerationConfig, name: str, whose: str) -> GenerationConfig:
    """The generation config, without the fields that have no effect if it cannot be saved with them.

    Many published configs cannot, such as that of Llama 2, because transformers has become stricter since.

    Raises:
        ValueError: if it cannot be saved without them either.
    """
    if _why_not_saved(config) is None:
        return config
    idle = [] if config.do_sample is True else [*_SAMPLING_FIELDS]
    if config.num_beams in (None, 1):
        idle += _BEAM_FIELDS
    if config.use_cache is False:
        idle.append("cache_implementation")
    if config.return_dict_in_generate is not True:
        idle += GenerationConfig.extra_output_flags
    if isinstance(config.pad_token_id, int) and config.pad_token_id < 0:  # No token has a negative id.
        idle.append("pad_token_id")
    given = {field: getattr(config, field, None) for field in idle}
    dropped = {field: value for field, value in given.items() if value is not None and value is not False}
    mended = copy.deepcopy(config)
    for field in dropped:
        setattr(mended, field, None)
    if (why := _why_not_saved(mended)) is not None:
        raise ValueError(
            f"The generation config of the {whose} {name!r} is one that transformers does not save: {why} Mend it in "
            "the generation_config.json of that model."
        )
    logger.warning(
        "The generation config of the %s %r sets %s, which has no effect as that config stands, and which "
        "transformers does not save: it is left out.",
        whose,
        name,
        ", ".join(f"{field}={value!r}" for field, value in dropped.items()),
    )
    return mended


def _why_not_saved(config: GenerationConfig) -> str | None:
    """Why transformers does not save a generation config, in one line; `None` if it does."""
    try:
        config.validate(strict=True)
    except (ValueError, TypeError) as error:  # It compares numbers with values of any type.
        return " ".join(str(error).split())
    return None


# Chats ---------------------------------------------------------------------------------------------------------------


def plain_chat_template(base_template: str = DEFAULT_TEMPLATE, opening: str = "") -> str:
    """The Jinja chat template that writes what [`plain_prompt`] writes, and refuses what it refuses.

    Args:
        base_template: one turn, as `plain_prompt` takes it.
        opening: the text before the prompt, such as a BOS token.

    Raises:
        ValueError: for a template that cannot be filled in.
    """
    later, first = _jinja_of(turn_template(base_template)), _jinja_of(base_template)
    return _CHAT_TEMPLATE.substitute(opening=_quoted(opening), first=first, later=later)


# All text stands in expressions, because Jinja drops line breaks of the text around them.
_CHAT_TEMPLATE = string.Template("""\
{%- macro text(message) -%}
    {%- set content = message['content'] -%}
    {%- if content is string -%}
        {{- content -}}
    {%- elif content is undefined or content is mapping or content is not sequence -%}
        {{- raise_exception('The content of a message must be text.') -}}
    {%- else -%}
        {%- for part in content -%}
            {%- if part is string -%}
                {{- part -}}
            {%- elif part is mapping and part['type'] == 'text' and part['text'] is string -%}
                {{- part['text'] -}}
            {%- else -%}
                {{- raise_exception('The content of a message must be text.') -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- if messages is string or messages is mapping or messages is not sequence -%}
    {{- raise_exception('A chat must be a list of messages.') -}}
{%- endif -%}
{%- for message in messages -%}
    {%- if message is not mapping -%}
        {{- raise_exception('A message must have a role and a content.') -}}
    {%- elif message['tool_calls'] or message['function_call'] -%}
        {{- raise_exception('The content of a message must be text, without tool calls.') -}}
    {%- endif -%}
{%- endfor -%}
{%- set has_system = messages and messages[0]['role'] == 'system' -%}
{%- set turns = messages[1:] if has_system else messages -%}
{%- if turns | length % 2 == 0 -%}
    {{- raise_exception('The last message of a chat must be the user\\'s.') -}}
{%- endif -%}
{{- $opening -}}
{%- for message in turns -%}
    {%- if message['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') -%}
        {{- raise_exception('A chat may begin with a system message; then user and assistant alternate.') -}}
    {%- endif -%}
    {%- if message['role'] == 'assistant' -%}
        {%- set said = text(message) -%}
        {{- said if said.endswith('\\n') else said ~ '\\n' -}}
    {%- elif loop.first and has_system -%}
        {%- set system, user = text(messages[0]), text(message) -%}
        {{- $first -}}
    {%- else -%}
        {%- set user = text(message) -%}
        {{- $later -}}
    {%- endif -%}
{%- endfor -%}
""")


# Makes a string of Jinja. Its escapes are Python's, and JSON's would split a character beyond 16 bits in two.
_quoted = partial(json.dumps, ensure_ascii=False)


def _jinja_of(template: str) -> str:
    """A Jinja expression whose value is `template.format(user=user, system=system)`."""
    parts = []
    for literal, field, _, _ in string.Formatter().parse(template):
        if literal:
            parts.append(_quoted(literal))
        if field is not None:
            parts.append(field)
    return " ~ ".join(parts)


def _opening(tokenizer: Any) -> str:
    """The text with which a chat must begin to be encoded as the tokenizer encodes a plain prompt.

    A tokenizer adds its BOS to a text but not to a chat, whose template writes it. After a BOS that is written, some
    tokenizers leave out the space that they put before the first word of a text.
    """
    ids, bare = tokenizer("a").input_ids, tokenizer("a", add_special_tokens=False).input_ids
    special = "".join(tokenizer.convert_ids_to_tokens(ids[: len(ids) - len(bare)]))
    for opening in (special, f"{special} "):
        if tokenizer(f"{opening}a", add_special_tokens=False).input_ids == ids:
            return opening
    raise ValueError(
        f"The base's tokenizer encodes 'a' as {tokenizer.convert_ids_to_tokens(ids)}, which no chat template can: let "
        "it add a BOS token or nothing."
    )


# Uploads -------------------------------------------------------------------------------------------------------------


def files_to_push(folder: str | os.PathLike[str]) -> dict[str, int]:
    """The files that [`push`] uploads: sorted paths within the folder, with their sizes in bytes.

    Raises:
        ValueError: if the folder carries no code.
    """
    root = Path(folder)
    if not (root / CODE / "generate.py").is_file():
        raise ValueError(
            f"There is no {CODE}/generate.py in {root}: write the folder with `nudging-hf hub export`, or put the "
            "code there with `nudging-hf hub code`."
        )
    found = sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
    return {
        path: (root / path).stat().st_size for path in filter_repo_objects(found, ignore_patterns=list(_NOT_UPLOADED))
    }


def validate_repo_name(repo_id: str) -> None:
    """Raises a `ValueError` for a name to which [`push`] cannot upload."""
    validate_repo_id(repo_id)
    if "/" not in repo_id:
        raise ValueError(f"The repository {repo_id!r} has no owner: give a name such as owner/{repo_id}.")


def push(folder: str | os.PathLike[str], repo_id: str, *, private: bool = False, revision: str | None = None) -> str:
    """Uploads a folder to a model repository on the Hugging Face Hub, which is created if there is none.

    Args:
        folder: a folder that [`export`] wrote, or any folder with `custom_generate`.
        repo_id: the name of the repository, such as "owner/name".
        private: whether a new repository is to be private; one that exists stays as it is.
        revision: a branch, which is created if there is none; the main one if it is left out.

    Returns:
        The address of the commit.

    Raises:
        ValueError: for a folder without code, and a name that the Hub does not take.
    """
    files_to_push(folder)
    validate_repo_name(repo_id)
    api = HfApi()
    # `None` leaves the choice to the owner's settings.
    api.create_repo(repo_id, private=private or None, exist_ok=True)
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    commit = api.upload_folder(
        repo_id=repo_id,
        folder_path=os.fspath(folder),
        revision=revision,
        ignore_patterns=list(_NOT_UPLOADED),
        commit_message="Upload with nudging_hf",
    )
    return str(commit.commit_url)
