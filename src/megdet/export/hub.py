"""Trained detectors on the Hugging Face hub: the weights as safetensors, everything else as text.

A repository has

    model.safetensors   the weights that `megdet detect` uses: the averages where the run keeps some
    config.json         the complete recipe, the classes, the step, and the SHA-256 of the weights
    README.md           the model card, with the metadata that the hub reads

Address, token and proxies are the affair of `huggingface_hub` (`HF_ENDPOINT`, `hf auth login`).
"""

import hashlib
import re
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch

from megdet import __version__
from megdet.data.user_cache import cache_folder
from megdet.errors import InputError
from megdet.files import (
    cannot_write,
    delete_leftovers,
    make_folder,
    read_json,
    temporary_name,
    write_json_atomically,
    write_text_atomically,
)
from megdet.inference.trained import check_weights, read_recipe
from megdet.model.choice import make_detector
from megdet.model.weight_file import read_tensors
from megdet.plain_yaml import dump_yaml
from megdet.recipe import Recipe
from megdet.recipe_file import dump_recipe, parse_recipe
from megdet.run_folder.checkpoint_files import (
    Kind,
    checkpoint_path,
    latest_checkpoint,
    open_checkpoint,
    save_checkpoint,
)
from megdet.run_folder.folder import RunFolder
from megdet.run_folder.run_state import RunState

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"


class HubConfig(msgspec.Struct, kw_only=True):
    """What `config.json` says."""

    library_name: str = "megdet"
    megdet_version: str = ""
    recipe: dict[str, Any]
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    step: Annotated[int, msgspec.Meta(ge=0)]
    """optimizer steps of the weights"""
    sha256: str
    """of `model.safetensors`"""
    evaluation: dict[str, Any] | None = None
    """the numbers of the run's last evaluation, as in evaluation.json"""


def push(
    folder: RunFolder, name: str, *, step: int | None = None, is_private: bool = False, revision: str | None = None
) -> str:
    """Publish the weights of a step, by default the newest, as a repository `owner/name`, made if it is not there.

    Returns its address. Raises InputError where the folder is no run with a checkpoint, and where the hub refuses.
    """
    from huggingface_hub import HfApi

    recipe, path = read_recipe(folder), latest_checkpoint(folder) if step is None else checkpoint_path(folder, step)
    if path is None:
        raise InputError(f"{folder.path}: the run has no checkpoint yet; `megdet train` writes one an epoch")
    checkpoint = open_checkpoint(path)
    state = checkpoint.state  # its numbers may be of an earlier step; pulled weights have their own, without a step
    kind: Kind = "averages" if "averages" in checkpoint.hashes else "model"
    checkpoint.tensors(kind)  # damaged weights are not published
    config = HubConfig(
        megdet_version=__version__,
        recipe=asdict(recipe),
        class_names=state.class_names,
        category_ids=state.category_ids,
        step=state.step,
        sha256=checkpoint.hashes[kind],
        evaluation=state.evaluation if state.evaluated_step in (-1, state.step) else None,
    )
    with tempfile.TemporaryDirectory(prefix="megdet_hub_") as made, _refusals(name):
        shutil.copyfile(checkpoint.file(kind), Path(made) / WEIGHTS)
        write_json_atomically(Path(made) / CONFIG, msgspec.to_builtins(config), indent=2)
        write_text_atomically(Path(made) / CARD, hub_card(name, config, recipe))
        api = HfApi(library_name="megdet", library_version=__version__)
        address = api.create_repo(name, private=is_private or None, exist_ok=True)
        api.upload_folder(
            repo_id=name,
            folder_path=made,
            revision=revision,
            commit_message=f"Weights of MegDet {__version__} after {config.step} steps",
        )
    return str(address)


def pull(name: str, folder: RunFolder, *, revision: str | None = None) -> HubConfig:
    """Make a run folder of a repository `owner/name`: `detect`, `evaluate`, `export` and `start_from` take it.

    Its recipe, classes and every tensor are checked before anything is written. Raises InputError where the folder
    holds a run, the hub refuses, or the repository is no detector of MegDet's.
    """
    from huggingface_hub import hf_hub_download

    if folder.read_recipe() is not None:
        raise InputError(f"{folder.path}: holds a run already; choose another --run folder")
    with _refusals(name):
        paths = [Path(hf_hub_download(name, file, revision=revision)) for file in (CONFIG, WEIGHTS)]
    config = read_json(paths[0], HubConfig)
    where = f"{name} on the hub"
    if config.library_name != "megdet":
        raise InputError(f"{where}: its {CONFIG} is of {config.library_name}, not of megdet")
    with paths[1].open("rb") as content:
        found = hashlib.file_digest(content, "sha256").hexdigest()
    if found != config.sha256:
        raise InputError(f"{where}: {WEIGHTS} is not what was published, its SHA-256 differs from that in {CONFIG}")
    recipe = parse_recipe(dump_yaml(config.recipe), f"{where}: {CONFIG}")
    weights = read_tensors(paths[1], where)
    with torch.device("meta"):  # shapes without memory: the file may claim millions of classes
        wanted = make_detector(recipe, len(config.class_names)).state_dict()
    check_weights(weights, wanted, where)
    try:
        state = RunState(
            step=config.step,
            class_names=config.class_names,
            category_ids=config.category_ids,
            num_images=0,
            evaluation=config.evaluation,
        )
    except ValueError as error:
        raise InputError(f"{where}: {CONFIG}: {error}") from None
    folder.create()
    save_checkpoint(folder, state, {"model": weights, "optimizer": {}}, keep=1)
    folder.write_recipe(dump_recipe(recipe))  # last: a folder with one holds a run, and is not pulled into again
    return config


def cached_run(name: str) -> RunFolder:
    """A run folder of a repository `owner/name` in the user's cache, as it is on the hub now. Raises as `pull`."""
    from huggingface_hub import hf_hub_download

    with _refusals(name):
        config = Path(hf_hub_download(name, CONFIG)).read_bytes()
    folder = RunFolder(cache_folder() / "hub" / f"{name.replace('/', '--')}-{hashlib.sha256(config).hexdigest()[:16]}")
    if not _is_whole(folder):
        make_folder(folder.path.parent)
        delete_leftovers(folder.path.parent)
        # others may pull it at the same time, threads of this process too
        own = RunFolder(folder.path.parent / temporary_name(f"{folder.path.name}-{threading.get_ident()}"))
        try:
            pull(name, own)
            if not _is_whole(folder):
                _remove(folder.path)
            own.path.rename(folder.path)
        except OSError as error:
            if not _is_whole(folder):  # else another process was first
                raise cannot_write(folder.path, error) from error
        finally:
            shutil.rmtree(own.path, ignore_errors=True)
    return folder


def _remove(path: Path) -> None:
    """Remove a folder that lacks files, by a cleaner of caches for example, so that it is gone at once."""
    aside = path.parent / temporary_name(f"{path.name}-{threading.get_ident()}-old")
    with suppress(FileNotFoundError):
        path.rename(aside)
        if _is_whole(RunFolder(aside)):  # another process has made it anew meanwhile
            aside.rename(path)
    shutil.rmtree(aside, ignore_errors=True)


def _is_whole(folder: RunFolder) -> bool:
    return folder.read_recipe() is not None and latest_checkpoint(folder) is not None


def hub_card(name: str, config: HubConfig, recipe: Recipe) -> str:
    """The model card as the hub shows it, with its metadata in front."""
    scores = (config.evaluation or {}).get("bbox", {})
    numbers = [
        (metric, scores[key])
        for metric, key in (("mmAP", "AP"), ("AP50", "AP50"), ("mmAR", "AR100"))
        if scores.get(key, -1) >= 0
    ]
    metadata = {"library_name": "megdet", "pipeline_tag": "object-detection", "tags": ["megdet", recipe.model.kind]}
    classes = ", ".join(_plain(own) for own in config.class_names)
    table = "\n".join(f"| {metric} | {100 * value:.1f} |" for metric, value in numbers)
    return f"""---
{dump_yaml(metadata)}---

# {_plain(name)}

A {recipe.model.kind} detector with the backbone {_plain(recipe.model.backbone.name)}, trained by MegDet
{_plain(config.megdet_version)} in {config.step} steps of {recipe.batch_size} images, BN size {recipe.bn_size}.

- classes ({len(config.class_names)}): {classes}
- SHA-256 of the weights: `{config.sha256}`
- `config.json` has the complete recipe

{"| its validation images | |" if numbers else "It has not been evaluated."}
{"| --- | --- |" if numbers else ""}
{table}

```sh
megdet hub pull {name} --run runs/pulled
megdet detect runs/pulled photo.jpg
```
"""


def _plain(text: str) -> str:
    """Text of others in Markdown: no markup, no line breaks."""
    return " ".join(re.sub(r"([\\`*_{}\[\]()<>#+!|~&$-])", r"\\\1", text).split())


@contextmanager
def _refusals(name: str) -> Iterator[None]:
    """What the hub or the network says becomes an InputError with the name of the repository."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    from huggingface_hub.errors import HTTPError as NetworkError  # type: ignore[attr-defined]  # of the client it uses

    try:
        yield
    except (HfHubHTTPError, HFValidationError, NetworkError) as error:
        raise InputError(f"{name}: the hub refuses or does not answer: {' '.join(str(error).split())}") from None
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{name}: {error}: is there a network, and is HF_ENDPOINT right?") from None
