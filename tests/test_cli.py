"""The command line: what the commands share, ``run``, ``check``'s exit codes and text, and docs/cli.md."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from checkpoints import digests, merge_here, recipe, run
from mergekit_select.cli import main
from mergekit_select.findings import KINDS

DOCS = Path(__file__).parents[1] / "docs" / "cli.md"


def invoke(*arguments) -> tuple[int, str, str]:
    """Run the command in this process; stdout and stderr apart."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments], prog_name="mergekit-select")
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    return result.exit_code, result.stdout, result.stderr


def written(folder: Path, config: dict, name: str = "recipe.yml") -> Path:
    file = folder / name
    file.write_text(yaml.safe_dump(config, sort_keys=False))
    return file


# --- what the commands share


def test_version_names_what_the_bits_depend_on():
    import mergekit_select
    from mergekit_select.selection import draws

    code, out, _ = invoke("--version")
    assert code == 0
    lines = dict(line.split() for line in out.splitlines())
    assert lines.keys() == {"mergekit-select", "mergekit", "torch", "draws"}
    assert lines["mergekit-select"] == mergekit_select.__version__
    assert lines["draws"] == str(draws.VERSION)


def test_merge_options_are_mergekits_own():
    import click
    from mergekit.options import MergeOptions, add_merge_options

    from mergekit_select.cli_options import MERGE_OPTIONS, _Size

    stock = {option.name: option for option in add_merge_options(lambda: None).__click_params__}
    for field, (kind, default, _) in MERGE_OPTIONS.items():
        assert MergeOptions.model_fields[field].default == default
        if not isinstance(kind, _Size):
            assert stock[field].type == click.types.convert_type(kind), field


def test_help_is_shown_without_torch():
    code = (
        "import sys\nfrom mergekit_select.cli import main\n"
        "for command in (['--help'], ['check', '--help'], ['run', '--help']):\n"
        "    main(command, standalone_mode=False)\n"
        "assert 'torch' not in sys.modules and 'mergekit' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_wrong_usage_exits_with_2():
    for arguments in (["chek"], ["check"], ["check", "--absent", "r.yml"], ["run", "toml"]):
        assert invoke(*arguments)[0] == 2


# --- run


def test_run_is_the_stock_command_with_the_methods_registered(llamas, tmp_path):
    # Without the startup file nothing but `run` makes the methods known.
    file = written(tmp_path, recipe("parameter_selection", llamas.base, llamas.subs))
    off = {"MERGEKIT_SELECT_DISABLE": "1"}
    result = run("mergekit-select", "run", "yaml", file, tmp_path / "out", "--quiet", "--no-copy-tokenizer", env=off)
    assert result.returncode == 0, result.stderr
    merge_here(tmp_path, recipe("parameter_selection", llamas.base, llamas.subs), "expected")
    assert digests(tmp_path / "out") == digests(tmp_path / "expected")
    assert not (tmp_path / "out" / "tokenizer.json").exists()


@pytest.mark.parametrize(
    ("name", "stock"), [("yaml", "run_yaml"), ("multi", "multimerge"), ("pytorch", "merge_raw_pytorch")]
)
def test_run_passes_all_arguments_on(name, stock, monkeypatch):
    import importlib

    import click

    seen = []
    module = importlib.import_module(f"mergekit.scripts.{stock}")
    command = click.Command(
        "stock",
        callback=lambda rest: seen.append(rest),
        params=[click.Argument(["rest"], nargs=-1)],
        context_settings={"ignore_unknown_options": True, "help_option_names": []},
    )
    monkeypatch.setattr(module, "main", command)
    assert invoke("run", name, "a.yml", "--help", "-v", "--cuda", "out")[0] == 0
    assert seen == [("a.yml", "--help", "-v", "--cuda", "out")]


# --- check: text, JSON, exit codes


@pytest.mark.filterwarnings("ignore")
def test_check_prints_what_it_finds(llamas, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(llamas.base, "base")
    shutil.copytree(llamas.subs[0], "sub")
    config = recipe("parameter_selection", "./base", ["./sub"], parameters={"wieght": 2, "normalize": True})
    code, out, err = invoke("check", written(tmp_path, config))
    assert out == (
        "error unknown-key at parameters.wieght: mergekit does not know the key wieght and silently ignores it "
        "(got 2); write weight\n"
        "warning unknown-key at parameters.normalize: mergekit silently ignores the key normalize here "
        "(got True); remove it, or see which method it belongs to\n"
        "reads 117.6 KB, writes 30 tensors, 58.8 KB; peak memory about 67.2 MB, at model.embed_tokens.weight\n"
        "this merge would not work: 1 error, 1 warning, 0 notes\n"
    )
    assert (code, err) == (1, "")


@pytest.mark.filterwarnings("ignore")
def test_exit_codes_of_check(llamas, tmp_path):
    good = recipe("parameter_selection", llamas.base, llamas.subs)
    file = written(tmp_path, good)
    assert invoke("check", file, "--quiet")[0] == 0
    assert invoke("check", file, "--strict")[0] == 0
    written(tmp_path, good | {"parameters": {"normalize": True}})
    assert invoke("check", file)[0] == 0
    assert invoke("check", file, "--strict")[0] == 1
    written(tmp_path, good | {"parameters": {"weight": -1}})
    assert invoke("check", file, "--quiet")[0] == 1


@pytest.mark.filterwarnings("ignore")
def test_json_of_check_has_a_schema_version(llamas, tmp_path):
    code, out, _ = invoke("check", written(tmp_path, recipe("linear", None, llamas.subs)), tmp_path / "out", "--json")
    report = json.loads(out)
    assert code == 1
    assert (report["schema"], report["command"], report["ok"]) == (1, "check", False)
    errors = [finding for finding in report["findings"] if finding["severity"] == "error"]
    assert errors[0].keys() == {"kind", "severity", "place", "value", "message", "remedy"}
    assert errors[0]["kind"] == "parameter-missing"
    assert report["costs"][0]["bytes_free"] > 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no full device")
@pytest.mark.parametrize("arguments", [[], ["--json"]])
def test_a_report_of_check_that_cannot_be_written(llamas, tmp_path, arguments):
    file = written(tmp_path, recipe("parameter_selection", llamas.base, llamas.subs))
    program = [sys.executable, "-m", "mergekit_select.cli", "check", str(file), *arguments]
    with open("/dev/full", "w") as full:
        done = subprocess.run(program, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "Error: cannot write the report to stdout: No space left on device\n"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "No such file or directory"),
        (b"", "is empty"),
        (b"# nothing\n", "is empty"),
        (b"\x93NUMPY\xff\xfe", "must be UTF-8 text"),
        (b"a: [1, 2", "must be YAML"),
        (b"a: \x00", "must be YAML"),
        (b"- a\n- b\n", "must be a YAML mapping"),
        (b"just words", "must be a YAML mapping"),
        (b"models: []\n", "must say merge_method"),
        (b"x" * (5 << 20), "has more than 4194304 bytes"),
        (b"[" * 5000, "must be YAML"),
    ],
)
def test_a_file_that_is_no_recipe_gives_one_line_and_2(content, says, tmp_path):
    file = tmp_path / "recipe.yml"
    if content is not None:
        file.write_bytes(content)
    code, out, err = invoke("check", file)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert err.startswith("Error: ")
    assert says in err
    assert str(file) in err


def test_a_folder_is_no_recipe(tmp_path):
    assert invoke("check", tmp_path) == (2, "", f"Error: cannot read the recipe {tmp_path}: Is a directory\n")


# --- models on a hub


class _Hub(ThreadingHTTPServer):
    """Serves folders as repositories, as far as metadata calls ask, and counts what it sends."""

    daemon_threads = True
    commit = "0123456789012345678901234567890123456789"

    def __init__(self, repositories: dict[str, Path]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories = repositories
        self.requests: list[str] = []
        self.sent: dict[str, int] = {}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Hub

    def log_message(self, *_args):
        pass

    def do_HEAD(self):
        self._answer(body=False)

    def do_GET(self):
        self._answer(body=True)

    def _answer(self, body: bool):
        path = self.path.partition("?")[0]
        self.server.requests.append(f"{self.command} {path}")
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/.+)?", path):
            folder = self.server.repositories.get(match[1])
            if folder is not None:
                files = [{"rfilename": file.name} for file in folder.iterdir()]
                described = {"id": match[1], "modelId": match[1], "sha": self.server.commit, "siblings": files}
                return self._send(200, json.dumps(described).encode(), body, "application/json")
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            folder = self.server.repositories.get(match[1])
            if folder is not None and (folder / match[2]).exists():
                return self._send(200, (folder / match[2]).read_bytes(), body, "application/octet-stream", match[2])
            if folder is not None:
                return self._send(404, b"", body, "text/plain", error="EntryNotFound")
        return self._send(404, b"", body, "text/plain", error="RepoNotFound")

    def _send(self, status, content, body, kind, name="", error=""):
        total, part = len(content), self.headers.get("Range")
        if part and status == 200:
            first, last = re.fullmatch(r"bytes=(\d+)-(\d+)", part).groups()
            content, status = content[int(first) : int(last) + 1], 206
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("X-Repo-Commit", self.server.commit)
        if status == 206:
            self.send_header("Content-Range", f"bytes {first}-{int(first) + len(content) - 1}/{total}")
        if name:
            self.send_header("ETag", f'"{abs(hash(name)):x}"')
        if error:
            self.send_header("X-Error-Code", error)
        self.end_headers()
        if body:
            self.server.sent[name] = self.server.sent.get(name, 0) + len(content)
            self.wfile.write(content)
        return


def test_hub_models_are_checked_without_their_weights(tmp_path_factory, tmp_path):
    import torch
    from safetensors.torch import save_file

    from checkpoints import tensors_of, write_llama

    source = tmp_path_factory.mktemp("hub")
    base = write_llama(source / "base", 0)
    # Weights large enough for a download to show.
    other = shutil.copytree(base, source / "other")
    for folder in (base, other):
        tensors = tensors_of(folder)
        tensors["ballast"] = torch.zeros(4_000_000)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    hub = _Hub({"team/base": base, "team/other": other})
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    config = recipe("parameter_selection", "team/base", ["team/other", "team/absent"])
    file = written(tmp_path, config)
    try:
        environment = {
            **os.environ,
            "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_address[1]}",
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        good_file = written(tmp_path, recipe("parameter_selection", "team/base", ["team/other"]), "good.yml")
        code = (
            "import json, sys\nfrom mergekit_select.check import check\n"
            "print(json.dumps([check(file).as_json() for file in sys.argv[1:]]))"
        )
        arguments = [sys.executable, "-c", code, file, good_file]
        output = subprocess.run(arguments, env=environment, capture_output=True, text=True)
    finally:
        hub.shutdown()
        hub.server_close()
    assert output.returncode == 0, output.stderr
    missing, good = json.loads(output.stdout)
    assert (missing["ok"], good["ok"]) == (False, True)
    assert [f["kind"] for f in missing["findings"] if f["severity"] == "error"] == ["model-missing"]
    kinds = [finding["kind"] for finding in good["findings"]]
    assert kinds.count("hub-id-not-pinned") == 2
    assert "same-file" not in kinds
    assert good["costs"][0]["tensors"] == 30
    assert sum(hub.sent.values()) < 1_000_000
    assert hub.sent["model.safetensors"] < 500_000
    assert len(hub.requests) < 60


# --- docs/cli.md


def _commands(command=main, path=("mergekit-select",)):
    import click

    context = click.Context(command, info_name=" ".join(path))
    yield path, command
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            if path[-1] != "run":  # the stock commands describe themselves
                yield from _commands(command.get_command(context, name), (*path, name))


def _help_blocks() -> dict[str, str]:
    import click

    blocks = {}
    for path, command in _commands():
        shown = click.Context(command, info_name=" ".join(path), terminal_width=100, max_content_width=100)
        first = f"```\n$ {' '.join(path)} --help\n"
        blocks[first] = f"{first}{command.get_help(shown).rstrip()}\n```"
    return blocks


def test_docs_show_the_help_of_every_command():
    text = DOCS.read_text("utf-8")
    for block in _help_blocks().values():
        # `python tests/test_cli.py` writes them anew.
        assert block in text, f"docs/cli.md must hold this block:\n{block}"


def test_docs_list_every_kind_of_finding():
    text = DOCS.read_text("utf-8")
    for kind, meaning in KINDS.items():
        assert f"| `{kind}` | {meaning} |" in text


def _write_help_into_docs() -> None:
    text = DOCS.read_text("utf-8")
    for first, block in _help_blocks().items():
        start = text.index(first)
        end = text.index("\n```", start + len(first)) + 4
        text = text[:start] + block + text[end:]
    DOCS.write_text(text, "utf-8")


if __name__ == "__main__":
    _write_help_into_docs()
