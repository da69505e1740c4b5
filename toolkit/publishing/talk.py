"""A talk with the base and the stages of a run, on a terminal or a pipe: one base, adapters switched."""

import json
import os
import signal
import sys
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2.exceptions import TemplateError
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text
from transformers import GenerationConfig, TextStreamer, set_seed

from toolkit.errors import ModelError, RunError, ToolkitError
from toolkit.evaluation.evaluate import BASE
from toolkit.models import model
from toolkit.models.switched import Switched
from toolkit.publishing.saved_run import SavedRun, load_run
from toolkit.rows import chat
from toolkit.wording import first_line

Messages = list[dict[str, str]]

COLUMN = 36  # characters; with less for each model, answers stand below each other
BIDIRECTIONAL = {*range(0x202A, 0x202F), *range(0x2066, 0x206A)}  # marks that reorder what is around them
HELP = """/reset         forget the conversation
/system TEXT   another system prompt (none without TEXT); forgets the conversation
/stage NAME    who answers from here on: {names}
/exit          leave; so does Ctrl-D. Ctrl-C stops an answer"""


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn."""

    greedy: bool = False
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    max_new_tokens: int = 512
    """Length of an answer, in tokens."""
    seed: int | None = None

    def check(self) -> None:
        """Refuse what has no effect, or no meaning.

        Raises:
            RunError: naming the flag.
        """
        asked = {"temperature": self.temperature, "top-p": self.top_p, "top-k": self.top_k}
        given = [f"--{name}" for name, value in asked.items() if value is not None]
        if self.greedy and given:
            raise RunError(f"{', '.join(given)}: no effect with --greedy; remove one of them")
        bounds = {
            "--temperature": (self.temperature is None or self.temperature > 0, "a number above 0, or --greedy"),
            "--top-p": (self.top_p is None or 0 < self.top_p <= 1, "a number above 0, at most 1"),
            "--top-k": (self.top_k is None or self.top_k >= 1, "at least 1"),
            "--max-new-tokens": (self.max_new_tokens >= 1, "at least 1"),
        }
        for flag, (good, expected) in bounds.items():
            if not good:
                raise RunError(f"{flag}: expected {expected}")

    def config(self, tokenizer: Any, room: int) -> GenerationConfig:
        """For `generate`, with at most `room` new tokens."""
        drawn: dict[str, Any] = {"do_sample": False}
        if not self.greedy:
            drawn = {"do_sample": True, "temperature": 0.7, "top_p": 0.95, "top_k": 0}
            asked = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
            drawn |= {name: value for name, value in asked.items() if value is not None}
        return GenerationConfig(
            max_new_tokens=min(self.max_new_tokens, room),
            eos_token_id=chat.stop_token_ids(tokenizer),
            pad_token_id=tokenizer.pad_token_id,
            **drawn,
        )


class Speaker:
    """The base with every stage's adapter attached; one of them acts at a time."""

    def __init__(self, run: SavedRun, sampling: Sampling):
        self.sampling = sampling
        self.tokenizer = chat.load_tokenizer(run.recipe)
        self.adapters: dict[str, Path | None] = {BASE: None, **run.adapters}
        self.models = Switched(run.recipe, model.detect_hardware(), list(run.adapters.values()))

    def answer(self, name: str, messages: Messages, heard: Callable[[str], None]) -> tuple[str, bool]:
        """Generate an answer; `heard` gets each new piece of it, as the model wrote it.

        Returns:
            The answer, and whether Ctrl-C cut it off.

        Raises:
            ModelError: the template refuses the messages, or they leave no room for an answer.
        """
        stream = _Stream(self.tokenizer, heard)
        try:
            ids, room = self._prompt(messages)
            inputs = torch.tensor([ids], device=self.models.model.device)
            if self.sampling.seed is not None:
                set_seed(self.sampling.seed)
            with torch.no_grad(), self.models.use(self.adapters[name]) as speaking:
                speaking.generate(
                    input_ids=inputs,
                    attention_mask=torch.ones_like(inputs),
                    generation_config=self.sampling.config(self.tokenizer, room),
                    streamer=stream,
                )
        except KeyboardInterrupt:
            stream.end()  # the word at which it was stopped
            return "".join(stream.pieces), True
        return "".join(stream.pieces), False

    def _prompt(self, messages: Messages) -> tuple[list[int], int]:
        """Token ids `(seq,)` and the tokens left for an answer; the oldest exchanges are left out where that is few."""
        text = self.models.model.config.get_text_config()
        limit = getattr(text, "max_position_embeddings", None) or sys.maxsize
        system = 1 if messages[0]["role"] == "system" else 0
        while True:
            ids = self._tokens(messages)
            room = limit - len(ids)
            if room >= min(self.sampling.max_new_tokens, limit // 4) or len(messages) <= system + 2:
                break
            messages = messages[:system] + messages[system + 2 :]
        if room < 1:
            raise ModelError(f"{len(ids):,} tokens, and the model has {limit:,} positions; ask something shorter")
        return ids, room

    def _tokens(self, messages: Messages) -> list[int]:
        if not self.tokenizer.chat_template:  # nothing marks turns, so that the text is continued
            return chat.tokenize_prompt(messages[-1]["content"], self.tokenizer)
        try:
            return chat.tokenize_prompt(messages, self.tokenizer)
        except TemplateError as error:
            raise ModelError(f"the chat template refuses this conversation: {first_line(error)}") from error


class _Stream(TextStreamer):
    """Hands on whole words as they are generated."""

    def __init__(self, tokenizer: Any, heard: Callable[[str], None]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.heard = heard
        self.pieces: list[str] = []

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.pieces.append(text)
        self.heard(text)


class Conversation:
    """What has been said, per model: with several, each goes on from its own answers."""

    def __init__(self, speaker: Speaker, names: list[str], system: str | None):
        self.speaker, self.names, self.system = speaker, names, system
        self.turns: dict[str, Messages] = {}
        if system is not None and not speaker.tokenizer.chat_template:
            raise ModelError("a system prompt needs a chat template, and there is none; set model.chat_template")

    def ask(self, prompt: str, name: str, heard: Callable[[str], None]) -> tuple[str, bool]:
        """One model's answer, and whether Ctrl-C cut it off; a prompt that cannot be answered is not remembered."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        said = [*self.turns.get(name, []), {"role": "user", "content": prompt}]
        answer, cut_off = self.speaker.answer(name, system + said, heard)
        self.turns[name] = [*said, {"role": "assistant", "content": answer}]
        return answer, cut_off

    def hand_to(self, name: str) -> None:
        """Let another model go on with the conversation, as the first of those before had it."""
        self.turns = {name: self.turns.get(self.names[0], [])}
        self.names = [name]


def talk(
    run: str | Path,
    sampling: Sampling,
    stage: str | None = None,
    *,
    compare: bool = False,
    system: str | None = None,
    as_json: bool = False,
    trust_remote_code: bool = False,
) -> None:
    """Talk to `base`, a stage, or with `compare` to all of them.

    On a terminal, a conversation with commands. Otherwise every line of the input that is not empty is a prompt and a
    conversation of its own.

    Raises:
        ToolkitError: no such run or stage, or a flag that does not fit.
    """
    sampling.check()
    saved = load_run(run, trust_remote_code)
    names = [BASE, *saved.adapters] if compare else [BASE if stage == BASE else saved.stage(stage)]
    on_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if as_json and on_terminal:
        raise RunError("--json: prompts come from a pipe, as in: toolkit chat RUN --json < prompts.txt")
    conversation = Conversation(Speaker(saved, sampling), names, system)
    if on_terminal:
        _on_terminal(conversation)
    else:
        _on_pipe(conversation, as_json)


def plain(text: str) -> str:
    """A model's text as a terminal may show it: without control characters, which could move, rewrite or recolour."""
    return "".join(c for c in text if c in "\n\t" or not (unicodedata.category(c) == "Cc" or ord(c) in BIDIRECTIONAL))


# --- a pipe ----------------------------------------------------------------------------------------------------------


def _on_pipe(conversation: Conversation, as_json: bool) -> None:
    try:
        for line in sys.stdin:
            prompt = line.rstrip("\r\n")
            if not prompt.strip():
                continue
            conversation.turns = {}
            answers = {}
            for name in conversation.names:
                answers[name], cut_off = conversation.ask(prompt, name, lambda _: None)
                if cut_off:
                    raise KeyboardInterrupt
            if as_json:
                print(json.dumps({"prompt": prompt, "answers": answers}), flush=True)
            elif len(answers) == 1:
                print(plain(*answers.values()), flush=True)
            else:
                print("\n".join(f"{name}: {plain(answer)}" for name, answer in answers.items()), flush=True)
    except UnicodeDecodeError as error:
        raise RunError(f"the input is not UTF-8: {error.reason} at byte {error.start}") from None
    except BrokenPipeError:  # whoever reads has heard enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# --- a terminal ------------------------------------------------------------------------------------------------------


def _on_terminal(conversation: Conversation) -> None:
    import readline  # noqa: F401 - gives `input` line editing and the lines before

    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # ends the talk; Ctrl-C, which is answered here, ends an answer
    print(f"{', '.join(conversation.names)}; /help shows the commands")
    if not conversation.speaker.tokenizer.chat_template:
        print("there is no chat template: the text is continued, and nothing is remembered")
    while True:
        try:
            line = input("> ").strip()
            if line == "/exit":
                return
            if line.startswith("/"):
                print(_command(conversation, line))
            elif line:
                _answer(conversation, line)
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\nCtrl-D leaves")
        except ToolkitError as error:
            print(f"error: {error}")


def _command(conversation: Conversation, line: str) -> str:
    command, _, argument = line.partition(" ")
    argument, names = argument.strip(), list(conversation.speaker.adapters)
    match command:
        case "/help":
            return HELP.format(names=", ".join(names))
        case "/reset":
            conversation.turns = {}
            return "forgotten"
        case "/system":
            replaced = Conversation(conversation.speaker, conversation.names, argument or None)
            conversation.system, conversation.turns = replaced.system, {}
            return f"system prompt: {argument}" if argument else "no system prompt"
        case "/stage":
            if argument not in names:
                return f"no stage {argument!r}; found {', '.join(names)}"
            conversation.hand_to(argument)
            return f"{argument} answers"
    return f"unknown command {command}; /help shows the commands"


def _answer(conversation: Conversation, prompt: str) -> None:
    console = Console(highlight=False, markup=False)
    if len(conversation.names) > 1 and console.width >= COLUMN * len(conversation.names):
        _side_by_side(conversation, prompt, console)
        return
    for name in conversation.names:
        try:
            if len(conversation.names) > 1:
                print(f"{name}:")
            _, cut_off = conversation.ask(prompt, name, lambda piece: print(plain(piece), end="", flush=True))
        except KeyboardInterrupt:  # just before the model begins, or just after
            cut_off = True
        print(" [stopped]" if cut_off else "")


def _side_by_side(conversation: Conversation, prompt: str, console: Console) -> None:
    """One column per model, filled in as they answer one after the other."""
    answers = dict.fromkeys(conversation.names, "")

    def table() -> Table:
        grid = Table(*answers, expand=True, show_edge=False)
        for column in grid.columns:
            column.ratio = 1
        grid.add_row(*(Text(plain(answer)) for answer in answers.values()))
        return grid

    with Live(table(), console=console, refresh_per_second=8) as live:
        for name in conversation.names:

            def heard(piece: str, name: str = name) -> None:
                answers[name] += piece
                live.update(table())

            _, cut_off = conversation.ask(prompt, name, heard)
            answers[name] += " [stopped]" if cut_off else ""
            live.update(table())
