"""The recipe: what one experiment is, as frozen, strict pydantic models.

`trainer`, `lora` and `quantization` hold fields of TRL, PEFT and transformers under their own names. They are not
declared again here; `toolkit.recipe.fields` checks them against the installed classes.
"""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, model_validator

Location = tuple[str | int, ...]
Format = Literal["messages", "sharegpt", "prompt_completion", "preference", "alpaca", "text"]


def _as_list(value: Any) -> Any:
    """A single source may stand without its list dash, and a path without its key."""
    items = value if isinstance(value, list) else [] if value is None else [value]
    return [{"path": item} if isinstance(item, str) else item for item in items]


class Strict(BaseModel):
    """Unknown keys are errors, values keep their YAML type, nothing changes after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


class Model(Strict):
    """The base model. Its weights are never changed."""

    name_or_path: str = Field(min_length=1)
    """Hub id, or a folder. A path that begins with `./` or `../` is relative to the recipe file."""
    revision: str | None = None
    """Branch, tag or commit on the Hub; the commit it resolved to is recorded in `resolved.json`."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Weights are held in this type. `auto`: bfloat16 where the hardware computes in it, else float32."""
    attn_implementation: str | None = None
    """Passed to `from_pretrained`; `None` takes transformers' choice."""
    chat_template: str | None = None
    """Name of a template (`chatml`, `zephyr`, or one that TRL ships, such as `llama3`), or a `.jinja` file."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model; `--trust-remote-code` must be given as well."""


class Source(Strict):
    """One data set, or a part of one."""

    path: str = Field(min_length=1)
    """Hub id, or a local JSON, JSONL, CSV or Parquet file, or a folder."""
    name: str | None = None
    """Configuration (subset) of a Hub data set."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""
    split: str = "train"
    """Split expression, as `datasets.load_dataset` reads it."""
    data_files: str | list[str] | None = None
    """Files inside `path`, as `datasets.load_dataset` reads them."""
    format: Format | None = None
    """Shape of the rows; detected from the columns where not given."""
    columns: dict[str, str] = {}
    """The toolkit's column name -> this file's column name, as in `{prompt: question, chosen: good}`."""
    limit: int | None = Field(None, ge=1)
    """At most this many rows, drawn by seed."""
    fraction: float | None = Field(None, gt=0, le=1)
    """This share of the rows, drawn by seed."""

    @model_validator(mode="after")
    def _one_way_to_draw(self) -> "Source":
        if self.limit is not None and self.fraction is not None:
            raise ValueError("both limit and fraction are given; keep one of them")
        return self


Sources = Annotated[list[Source], BeforeValidator(_as_list, json_schema_input_type=str | Source | list[str | Source])]


def _as_action(value: Any) -> Any:
    """`guard: stop` is short for `guard: {action: stop}`; YAML reads a bare `off` as false."""
    return {"action": "off" if value is False else value} if value is False or isinstance(value, str) else value


class Guard(Strict):
    """What is watched during DPO, and the bounds beyond which it is said. Bounds have no effect on training."""

    action: Literal["warn", "stop", "off"] = "warn"
    """`stop` ends the stage's training at the first bound that is passed."""
    chosen_drop: float = Field(0.5, gt=0)
    """Fall of the chosen answers' log-probability below the reference's, in nats per token."""
    kl: float = Field(0.5, gt=0)
    """KL to the reference on the policy's own samples, in nats per token; also the bound of `keep: best`."""
    length: float = Field(2.0, gt=1)
    """Length of answers, in lengths of the reference's own or of the chosen ones, whichever are longer."""
    repetition: float = Field(0.2, gt=0, le=1)
    """Rise of the share of repeated 4-grams over the reference's."""
    stopped: float = Field(0.25, gt=0, le=1)
    """Fall of the share of answers that end by themselves below the reference's."""
    margin: float = Field(5.0, gt=0)
    """Reward margin beyond which an accuracy of 1.0 leaves nothing to learn."""
    flat: float = Field(0.005, gt=0)
    """Distance from ln 2 within which the loss counts as flat, from half of the steps on."""
    prompts: int = Field(8, ge=1)
    """How many held-out prompts are answered at each evaluation: once greedily, once sampled."""
    max_new_tokens: int = Field(128, ge=1)
    """Length of those answers, in tokens."""


Guarded = Annotated[Guard | None, BeforeValidator(_as_action)]


class Stage(Strict):
    """One training stage: TRL's SFTTrainer or DPOTrainer on one adapter."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    """Folder name in the run directory; unique. Defaults to the type."""
    type: Literal["sft", "dpo"]
    from_: str | None = Field(None, alias="from")
    """`base`, the name of an earlier stage, or an adapter (folder or Hub id). Default: the stage before."""
    adapter: Literal["new", "continue"] = "new"
    """`new`: a new adapter over the frozen one it starts from. `continue`: train that one further."""
    lora: dict[str, Any] | None = None
    """Fields of `peft.LoraConfig`, over those of the recipe."""
    data: Sources = Field(min_length=1)
    eval_data: Sources = []
    trainer: dict[str, Any] = {}
    """Fields of `trl.SFTConfig` or `trl.DPOConfig`."""
    reference: Literal["cached", "online"] = "cached"
    """DPO: reference log-probs in one pass before training, kept for later runs; or on every step."""
    stop_after_nonfinite: int = Field(3, ge=1)
    """The stage stops at so many steps in a row whose loss or gradient is NaN or infinite; none of them is applied."""
    prefix_sharing: bool = True
    """DPO: run each prompt once for its pair, wherever that is exact."""
    guard: Guarded = None
    """DPO: over the recipe's own `guard`, key by key."""
    keep: Literal["last", "best"] = "last"
    """DPO: the weights after the last step, or of the checkpoint that does best on `eval_data` within the KL bound."""

    @model_validator(mode="before")
    @classmethod
    def _name_defaults_to_type(cls, value: Any) -> Any:
        return {"name": value["type"], **value} if isinstance(value, dict) and "type" in value else value


class Score(Strict):
    """How one column of the closing table is counted: the share of answers that fulfil it."""

    column: str | None = None
    """The answer contains the text in this column of the row."""
    exact: str | None = None
    """The answer is the text in this column of the row, apart from the space around both."""
    regex: str | None = None
    """The answer matches this regular expression."""

    @property
    def needs(self) -> str | None:
        """The column it reads."""
        return self.column or self.exact

    @property
    def rule(self) -> tuple[str, str]:
        """Which of the three it is, and its value."""
        return next((how, what) for how in ("column", "exact", "regex") if (what := getattr(self, how)) is not None)

    @model_validator(mode="after")
    def _exactly_one(self) -> "Score":
        if [self.column, self.exact, self.regex].count(None) != 2:
            raise ValueError("give one of column, exact and regex")
        try:
            re.compile(self.regex or "")
        except re.error as error:
            raise ValueError(f"{self.regex!r} is not a regular expression: {error}") from None
        return self


class Evaluate(Strict):
    """What is measured on held-out rows, for the base and for each stage when it finishes."""

    data: Sources = []
    """Rows with `prompt`, which are answered; with an answer as well (`completion`, `messages`, `output`), whose
    perplexity is measured; with `chosen` and `rejected`, which are compared. What the rows lack is taken from the
    stages' `eval_data`."""
    scores: dict[str, Score] = {}
    """Column title -> how it is counted, on greedy answers."""
    max_new_tokens: int = Field(128, ge=1)
    """Length of an answer, in tokens."""
    batch_size: int = Field(32, ge=1)
    samples: int = Field(3, ge=0)
    """How many prompts are printed with the answers below them."""
    lm_eval: list[str] = []
    """Tasks of EleutherAI's lm-evaluation-harness, which is an extra: `pip install lm-eval`."""
    include_path: str | None = None
    """Folder with tasks of your own for `lm_eval`, as the harness reads them."""

    @model_validator(mode="after")
    def _tasks_of_the_folder_are_named(self) -> "Evaluate":
        if self.include_path is not None and not self.lm_eval:
            raise ValueError("include_path is ignored without lm_eval; name the tasks there, or remove it")
        return self


class Hub(Strict):
    """Where the adapter is pushed once training has ended and the adapter is verified; the flags of `toolkit push`."""

    repo_id: str = Field(pattern=r"^[\w.-]+/[\w.-]+$")
    private: bool = False
    """Create the repository as a private one; refuse one that exists and is public."""
    stage: str | None = None
    """Push the adapter of this stage; by default the last one's."""
    revision: str | None = Field(None, pattern=r"^[\w./-]+$")
    """Branch to push to; created where it is not there. Default: `main`."""
    tag: str | None = Field(None, pattern=r"^[\w./-]+$")
    """Git tag for the commit."""
    create_pr: bool = False
    """Open a pull request in place of a commit; pushed again, the same one is brought up to date."""
    verify: bool = True
    """Fetch the adapter after the push, past the cache, and compare it with what was sent."""

    @model_validator(mode="after")
    def _no_pull_request_elsewhere(self) -> "Hub":
        if self.create_pr and (self.revision or self.tag):
            raise ValueError("create_pr opens a pull request to main; remove revision and tag")
        return self


class Recipe(Strict):
    """One experiment. Load one with `toolkit.load_recipe`."""

    model: Model
    quantization: dict[str, Any] | None = None
    """Fields of `transformers.BitsAndBytesConfig`."""
    lora: dict[str, Any] = {}
    """Fields of `peft.LoraConfig`."""
    stages: list[Stage] = Field(min_length=1)
    evaluate: Evaluate | None = None
    guard: Guarded = None
    """What is watched in DPO stages, and the bounds; on by default, as warnings."""
    hub: Hub | None = None
    seed: int = Field(42, ge=0)

    _file: Path = PrivateAttr(default=Path("recipe.yaml"))
    _lines: dict[Location, str] = PrivateAttr(default_factory=dict)
    _written: dict[str, str] = PrivateAttr(default_factory=dict)
    _allow_pickle: bool = PrivateAttr(default=False)

    @property
    def allow_pickle(self) -> bool:
        """Whether base weights may be loaded from pickles, as whoever runs the recipe decides."""
        return self._allow_pickle

    @property
    def file(self) -> Path:
        """The recipe file it was loaded from."""
        return self._file

    @property
    def written(self) -> dict[str, str]:
        """Absolute path -> `./path` or `../path` as it stands in the recipe file."""
        return self._written

    def adjusted(self, **changes: Any) -> "Recipe":
        """The same recipe, from the same file, with other values under these keys."""
        changed = self.model_copy(update=changes)
        changed._file, changed._lines, changed._written = self._file, self._lines, self._written
        changed._allow_pickle = self._allow_pickle
        return changed

    def where(self, *location: str | int) -> str:
        """`file:line: dotted.key` of a location such as `("stages", 0, "data", 0, "path")`, for error messages."""
        return f"{position(self._lines, location) or self._file}: {dotted(location)}"


def position(lines: dict[Location, str], location: Location) -> str:
    """`file:line` of the location, or of the nearest thing around it that has a line."""
    while location and location not in lines:
        location = location[:-1]
    return lines.get(location, "")


def dotted(location: Location) -> str:
    """`("stages", 0, "data")` -> `stages[0].data`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).lstrip(".")
