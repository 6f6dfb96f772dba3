"""What a tritonserver needs around it: the binary, its backend folder, and a Python that its models can use.

The binary is the one on PATH (NVIDIA's container), else that of the nvidia-pytriton wheel, which is started
directly and needs a backend folder put together first. Checks come before any start, because the failures
they prevent are silent: with numpy 2 the wheel's Python stub reads numbers wrongly, without libpython it
never answers.
"""

from __future__ import annotations

import ipaddress
import os
import shutil
import socket
import sys
import sysconfig
from ctypes.util import find_library
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path

from blockzoo.zoo.errors import ZooError


class ServerError(ZooError):
    """The server cannot be started or kept up here; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Tritonserver:
    """A tritonserver ready to be started: arguments that say where its parts are, and its environment;
    `bundled`: that of the nvidia-pytriton wheel."""

    command: tuple[str, ...]
    environment: dict[str, str]
    bundled: bool = False


def find_tritonserver(folder: Path) -> Tritonserver:
    """Find the server; a backend folder is put together in `folder` where it needs one.

    Raises:
        ServerError: there is none, or this Python does not suit it.
    """
    check_python()
    environment = dict(os.environ)
    # the models' Python is the first on PATH, whatever PYTHONPATH says
    environment["PATH"] = os.pathsep.join(
        [str(Path(sys.prefix) / "bin"), environment.get("PATH", os.defpath)]
    )
    installed = shutil.which("tritonserver")
    if installed is not None:
        root = Path(installed).resolve().parent.parent
        parts = [f"--{kind}-directory={root / kind}s" for kind in ("backend", "cache")]
        return Tritonserver((installed, *parts), environment)
    wheel = _wheel_folder()
    backends = _backend_folder(wheel, folder)
    libraries = [str(wheel.parents[1] / "nvidia_pytriton.libs"), *map(str, _library_folders())]
    environment["LD_LIBRARY_PATH"] = os.pathsep.join([*libraries, environment.get("LD_LIBRARY_PATH", "")])
    command = (
        str(wheel / "bin" / "tritonserver"),
        f"--backend-directory={backends}",
        f"--cache-directory={wheel / 'caches'}",
    )
    return Tritonserver(command, environment, bundled=True)


def check_host(host: str, server: Tritonserver, insecure: bool) -> None:
    """Refuse to show the bundled server to other machines, unless it is asked for. Raises ServerError."""
    if server.bundled and not insecure and not is_loopback(host):
        raise ServerError(
            f"--host {host}: the tritonserver of nvidia-pytriton is a version with published holes (such as "
            "CVE-2025-23319), and single requests of a hostile client end it: put a newer tritonserver on "
            "PATH, run in NVIDIA's container, or add --insecure where every client is trusted"
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches that address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_python(version: tuple[int, int] = sys.version_info[:2], numpy_version: str | None = None) -> None:
    """Check that Triton's Python stub can run this interpreter. Raises ServerError."""
    name = ".".join(map(str, version))
    if not (3, 10) <= version <= (3, 12):
        raise ServerError(f"this is Python {name}; the server runs its models with 3.10, 3.11 or 3.12")
    numpy_version = numpy_version or metadata.version("numpy")
    if not numpy_version.startswith("1."):
        raise ServerError(
            f"numpy is {numpy_version}; Triton's Python stub reads numpy 2 arrays wrongly: "
            "pip install 'numpy<2'"
        )
    library = f"libpython{name}.so.1.0"
    in_folder = any((folder / library).exists() for folder in _library_folders())
    if not in_folder and find_library(f"python{name}") is None:
        raise ServerError(
            f"{library} is not to be found; Triton's Python models need it: install libpython{name} "
            f"(Debian, Ubuntu: apt-get install libpython{name})"
        )


def free_ports(host: str, ports: dict[str, int]) -> dict[str, int]:
    """Check that the ports are free; 0 is replaced by a free one.

    Args:
        host: address to listen on.
        ports: by the name of the option that sets each.

    Raises:
        ServerError: a port is taken, asked for twice, or the address is not of this machine.
    """
    bound: dict[str, socket.socket] = {}
    try:
        for option, port in ports.items():
            listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            bound[option] = listener
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind((host, port))
                listener.listen(1)
            except socket.gaierror:
                raise ServerError(f"--host {host} is not an address; use 127.0.0.1 or 0.0.0.0") from None
            except OSError as error:
                reason = error.strerror or str(error)
                raise ServerError(
                    f"cannot listen on {host}:{port} ({reason}); choose another {option}, or --host"
                ) from None
        return {option: listener.getsockname()[1] for option, listener in bound.items()}
    finally:
        for listener in bound.values():
            listener.close()


def _wheel_folder() -> Path:
    spec = util.find_spec("pytriton")
    folder = Path(spec.origin).parent / "tritonserver" if spec is not None and spec.origin else None
    if folder is None or not (folder / "bin" / "tritonserver").is_file():
        raise ServerError(
            "no tritonserver on PATH and none in this environment; pip install nvidia-pytriton==0.7.0, or "
            "run in NVIDIA's Triton container"
        )
    return folder


def _backend_folder(wheel: Path, folder: Path) -> Path:
    """Links to the wheel's Python backend, with a copy of this Python's stub, which finds models by its own
    place."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = wheel / "python_backend_stubs" / version / "triton_python_backend_stub"
    if not stub.is_file():
        raise ServerError(f"{wheel} has no Python stub for Python {version}; use Python 3.10, 3.11 or 3.12")
    backend = folder / "backends" / "python"
    backend.mkdir(parents=True)
    for file in (wheel / "backends" / "python").iterdir():
        if file.is_file():
            (backend / file.name).symlink_to(file)
    shutil.copyfile(stub, backend / stub.name)
    (backend / stub.name).chmod(0o755)
    return backend.parent


def _library_folders() -> list[Path]:
    """Where this interpreter's libpython may be."""
    folders = [sysconfig.get_config_var("LIBDIR"), str(Path(sys.base_prefix) / "lib")]
    return [Path(folder) for folder in dict.fromkeys(folders) if folder]
