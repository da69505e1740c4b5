"""The talk: what plain transformers answers, on a pipe and on a terminal."""

import io
import json
import os
import pty
import re
import select
import signal
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

import toolkit
from tests.finished import finished_run, pulled
from tests.test_adapter import random_adapter
from tests.tiny import make_base
from toolkit.cli import main
from toolkit.publishing.saved_run import load_run
from toolkit.publishing.talk import Conversation, Sampling, Speaker, _side_by_side, plain, talk

GREEDY = Sampling(greedy=True, max_new_tokens=12)


@cache
def speaker(base: Path) -> Speaker:
    return Speaker(load_run(finished_run(base)), GREEDY)


def plain_answer(base: Path, adapter: Path | None, messages: list[dict[str, str]]) -> str:
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, str(adapter)) if adapter else model
    tokenizer = AutoTokenizer.from_pretrained(base)
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=12, do_sample=False)
    return tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_everyone_answers_as_plain_transformers_does(base: Path) -> None:
    run = finished_run(base)
    talking = Conversation(speaker(base), ["base", "sft", "dpo"], None)
    answers = {name: talking.ask("what is red", name, lambda _: None)[0] for name in talking.names}
    assert len(set(answers.values())) == 3
    for name, folder in (("base", None), ("sft", run / "sft" / "adapter"), ("dpo", run / "adapter")):
        assert answers[name] == plain_answer(base, folder, user("what is red"))


def test_the_history_and_the_system_prompt_are_part_of_the_next_prompt(base: Path) -> None:
    talking = Conversation(speaker(base), ["dpo"], "be kind")
    first, _ = talking.ask("what is red", "dpo", lambda _: None)
    second, _ = talking.ask("and blue", "dpo", lambda _: None)
    said = [{"role": "system", "content": "be kind"}, *user("what is red"), {"role": "assistant", "content": first}]
    assert second == plain_answer(base, finished_run(base) / "adapter", said + user("and blue"))
    talking.hand_to("sft")
    assert [turn["role"] for turn in talking.turns["sft"]] == ["user", "assistant", "user", "assistant"]


def test_pieces_arrive_as_they_are_generated_and_ctrl_c_stops_there(base: Path) -> None:
    pieces: list[str] = []

    def heard(piece: str) -> None:
        pieces.append(piece)
        if len(pieces) == 3:
            signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    answer, cut_off = speaker(base).answer("dpo", user("what is red"), heard)
    signal.signal(signal.SIGINT, before)
    assert cut_off
    assert 3 <= len(pieces) <= 5  # the third piece, and the rest of a word
    assert answer == "".join(pieces)
    assert speaker(base).answer("dpo", user("what is red"), lambda _: None)[1] is False


def test_a_long_conversation_loses_its_oldest_exchanges(base: Path) -> None:
    long = [*user("the sun " * 100), {"role": "assistant", "content": "a"}]
    system = [{"role": "system", "content": "be kind"}]
    ids, room = speaker(base)._prompt(system + long * 3 + user("what is red"))
    assert (ids, room) == speaker(base)._prompt(system + long * 2 + user("what is red"))
    assert len(ids) + room == 512
    with pytest.raises(toolkit.ModelError, match="the model has 512 positions; ask something shorter"):
        speaker(base)._prompt(user("the sun " * 600))


def test_on_a_pipe_one_answer_a_prompt(
    base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(finished_run(base))
    flags = ["--greedy", "--max-new-tokens", "12"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("what is red\n\nwhat is blue\n"))
    assert main(["chat", run, *flags, "--compare", "--json"]) == 0
    first, second = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert first["prompt"] == "what is red"
    assert second["answers"]["sft"] == plain_answer(base, Path(run) / "sft" / "adapter", user("what is blue"))
    monkeypatch.setattr(sys, "stdin", io.StringIO("what is red\n"))
    assert main(["chat", run, *flags, "--stage", "base"]) == 0
    assert capsys.readouterr().out == plain(first["answers"]["base"]) + "\n"


def test_a_seed_draws_the_same_answers_again(base: Path) -> None:
    drawn = speaker(base)
    answers = []
    for seed in (1, 1, 2):
        drawn.sampling = Sampling(temperature=1.5, max_new_tokens=12, seed=seed)
        answers.append(drawn.answer("dpo", user("what is red"), lambda _: None)[0])
    drawn.sampling = GREEDY
    assert answers[0] == answers[1] != answers[2]


def test_side_by_side(base: Path) -> None:
    talking = Conversation(speaker(base), ["base", "sft", "dpo"], None)
    console = Console(file=io.StringIO(), width=120)
    _side_by_side(talking, "what is red", console)
    lines = [re.split("[│┃]", line) for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]
    assert [cell.strip() for cell in lines[0]] == ["base", "sft", "dpo"]
    for column, name in enumerate(talking.names):
        told = "".join(cells[column].strip() for cells in lines[2:] if len(cells) == 3)
        assert told == "".join(plain(talking.turns[name][-1]["content"]).split("\n")).strip()


def test_what_a_model_says_cannot_move_the_cursor() -> None:
    assert plain("a\x1b[2Jb\r\x07\x9b31m\x7fc\n\td [bold]e[/] \u202eא é 👩\u200d🚀") == (
        "a[2Jb31mc\n\td [bold]e[/] א é 👩\u200d🚀"
    )


def test_without_a_template_the_text_is_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = make_base(tmp_path / "base", chat_template=None)
    random_adapter(base, tmp_path / "adapter", 1, r=4, target_modules="all-linear")
    run = pulled(tmp_path, base)
    monkeypatch.setattr(sys, "stdin", io.StringIO("the sun is\n"))
    talk(run, GREEDY, as_json=True)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "adapter"))
    tokenizer = AutoTokenizer.from_pretrained(base)
    ids = tokenizer("the sun is", return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids.input_ids.shape[1] :]
    answer = json.loads(capsys.readouterr().out)["answers"]["adapter"]
    assert answer == tokenizer.decode(out, skip_special_tokens=True)
    with pytest.raises(toolkit.ModelError, match="a system prompt needs a chat template"):
        talk(run, GREEDY, system="be kind")


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--greedy", "--top-k", "3"], "--top-k: no effect with --greedy; remove one of them"),
        (["--temperature", "0"], "--temperature: expected a number above 0, or --greedy"),
        (["--top-p", "1.5"], "--top-p: expected a number above 0, at most 1"),
        (["--stage", "dop"], "no finished stage 'dop'; found sft, dpo"),
    ],
)
def test_flags_that_do_not_fit(base: Path, flags: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", str(finished_run(base)), *flags]) == 2
    assert text in capsys.readouterr().err


PATIENCE = 120  # seconds without a character, on a machine that is busy


class Terminal:
    """A command that has a pseudo-terminal for its own, driven by what it shows."""

    def __init__(self, command: list[str]):
        self.process, self.stream = pty.fork()
        if self.process == 0:
            signal.signal(
                signal.SIGINT, signal.SIG_DFL
            )  # a job in the background ignores it, and so would its children
            os.execvpe(command[0], command, os.environ | {"TERM": "dumb", "COLUMNS": "80"})
        self.shown = ""

    def until(self, text: str) -> str:
        """What is shown up to and with the text."""
        while text not in self.shown:
            assert select.select([self.stream], [], [], PATIENCE)[0], f"no {text!r} after {self.shown!r}"
            self.shown += os.read(self.stream, 65536).decode(errors="replace").replace("\r\n", "\n")
        before, _, self.shown = self.shown.partition(text)
        return before + text

    def type(self, text: str) -> None:
        os.write(self.stream, text.encode())

    def exit_code(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])


def test_on_a_terminal(base: Path) -> None:
    run = finished_run(base)
    settings = ["--greedy", "--max-new-tokens", "200", "--compare"]
    terminal = Terminal([sys.executable, "-m", "toolkit", "chat", str(run), *settings])
    assert "base, sft, dpo; /help shows the commands" in terminal.until("> ")
    terminal.type("what is a\n")
    terminal.until("base:\n")
    terminal.type("\x03")  # the base's answer only: the others go on
    assert "[stopped]" in terminal.until("sft:\n")
    terminal.until("dpo:\n")
    terminal.until("\n> ")
    terminal.type("/stage dpo\n")
    assert "dpo answers" in terminal.until("\n> ")
    terminal.type("/system be kind\n")
    assert "system prompt: be kind" in terminal.until("\n> ")
    terminal.type("/stage nobody\n")
    assert "no stage 'nobody'; found base, sft, dpo" in terminal.until("\n> ")
    terminal.type("/reset\n")
    assert "forgotten" in terminal.until("\n> ")
    terminal.type("what is red\n")
    answer = plain_answer(base, run / "adapter", [{"role": "system", "content": "be kind"}, *user("what is red")])
    said = terminal.until("\n> ")
    assert plain(answer).strip()[:12] in said
    assert "\x1b" not in said
    terminal.type("\x04")
    assert terminal.exit_code() == 0


def test_a_talk_ends_on_sigterm(base: Path) -> None:
    terminal = Terminal([sys.executable, "-m", "toolkit", "chat", str(finished_run(base))])
    terminal.until("> ")
    os.kill(terminal.process, signal.SIGTERM)
    assert terminal.exit_code() == -signal.SIGTERM
