"""Checks before the server is started, and zoo-serve's own errors."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest

from blockzoo.server_config import environment
from blockzoo.server_config.environment import (
    ServerError,
    Tritonserver,
    check_host,
    check_python,
    free_ports,
)
from blockzoo.server_config.launcher import Endpoints
from blockzoo.server_config.serve import main


@pytest.mark.parametrize("version", [(3, 9), (3, 13)])
def test_other_pythons_are_refused(version):
    with pytest.raises(ServerError, match=r"runs its models with 3.10, 3.11 or 3.12"):
        check_python(version)


def test_numpy_2_is_refused():
    with pytest.raises(ServerError, match=r"numpy is 2\.1\.0; .* pip install 'numpy<2'"):
        check_python(numpy_version="2.1.0")


def test_a_missing_libpython_names_the_package(monkeypatch):
    monkeypatch.setattr(environment, "find_library", lambda name: None)
    monkeypatch.setattr(environment, "_library_folders", list)
    with pytest.raises(ServerError, match=r"apt-get install libpython3\.11"):
        check_python((3, 11))


def test_this_environment_is_fit():
    check_python()


def test_port_0_takes_free_ports_and_all_differ():
    ports = free_ports("127.0.0.1", {"--http-port": 0, "--grpc-port": 0, "--metrics-port": 0})
    assert len(set(ports.values())) == 3


def test_a_port_in_use_is_told_before_any_start():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ServerError, match=f"127.0.0.1:{port} .*; choose another --grpc-port"):
            free_ports("127.0.0.1", {"--http-port": 0, "--grpc-port": port})


def test_a_port_asked_for_twice_is_told():
    port = free_ports("127.0.0.1", {"--http-port": 0})["--http-port"]
    with pytest.raises(ServerError, match="choose another --grpc-port"):
        free_ports("127.0.0.1", {"--http-port": port, "--grpc-port": port})


def test_a_host_of_another_machine_is_told():
    with pytest.raises(ServerError, match=r"cannot listen on 192\.0\.2\.1"):
        free_ports("192.0.2.1", {"--http-port": 0})


def test_the_curl_line_for_all_interfaces_is_one_that_works_here():
    assert Endpoints("0.0.0.0", 80, 81, 82).http == "http://127.0.0.1:80"


def test_a_missing_zoo_is_one_line(tmp_path, capsys):
    assert main([str(tmp_path / "none"), "--http-port", "0", "--grpc-port", "0", "--metrics-port", "0"]) == 1
    assert "zoo-compile" in capsys.readouterr().err


def test_a_bad_setting_is_one_line(tmp_path, capsys):
    assert main([str(tmp_path), "--max-model-len", "-5"]) == 1
    assert "max_model_len is -5" in capsys.readouterr().err


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from blockzoo.server_config import arguments; arguments.build_parser().format_help(); "
        "print(sorted({'numpy', 'openvino', 'tokenizers', 'tritonclient'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


@pytest.mark.parametrize("host", ["0.0.0.0", "10.1.2.3", "example.org", "::"])
def test_the_bundled_server_is_shown_to_other_machines_only_if_asked(host):
    bundled, newer = Tritonserver((), {}, bundled=True), Tritonserver((), {})
    with pytest.raises(ServerError, match=rf"--host {host}: .* add --insecure where every client is trusted"):
        check_host(host, bundled, insecure=False)
    check_host(host, bundled, insecure=True)
    check_host(host, newer, insecure=False)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "localhost", "::1"])
def test_this_machine_may_always(host):
    check_host(host, Tritonserver((), {}, bundled=True), insecure=False)
