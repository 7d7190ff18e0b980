"""The worker: one live model, resident sources, one fitness."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evomerge.errors import EvaluationError, ModelError, SetupError
from evomerge.fitness.goals import GoalSpec, load_fitness
from evomerge.fitness.protocol import Live, Scorer
from evomerge.fitness.tasks import TaskSpec
from evomerge.loading import loading_turn
from evomerge.memory import available_bytes, neighbours
from evomerge.merge.change import Change, coefficient_norm
from evomerge.merge.engine import Engine
from evomerge.merge.factor_sources import factored
from evomerge.merge.merger import Merger, alone
from evomerge.merge.residency import Needs, Room, choose
from evomerge.models import Models, open_models
from evomerge.pool import one_line, out_of_memory
from evomerge.racing import run_job_items
from evomerge.recipe import Recipe
from evomerge.resident import Guard
from evomerge.trial import Evaluation, Job

if TYPE_CHECKING:
    import torch

_LOG = logging.getLogger(__name__)
#: What lm-eval's HFLM scores; it tells the two apart by the model's own config.
_SCORED = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM")
_TORCH_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True, slots=True)
class ModelWorkerFactory:
    """How to build a worker; a few hundred bytes that travel to where it will live.

    Attributes:
        base: directory or hub id.
        experts: (name, directory or hub id), in order.
        dtype: safetensors name of the dtype that is scored.
        device: ``auto`` (a CUDA device where one is visible), ``cpu`` or ``cuda``.
        threads: CPU threads for merging and scoring.
        tasks: the objectives that are lm-eval tasks; they come first.
        goals: the objectives that are not.
        include_paths: folders with task files.
        data_root: what relative data paths of tasks start from.
        allow_task_code: whether task files may run Python code.
        batch_size: requests per forward pass of lm-eval's own code.
        batch_tokens: tokens per forward pass; None to find it by memory.
        residency: ``auto``, ``device``, ``host`` or ``disk``; see ``evomerge.merge.residency``.
        workers: of the study; those that can be on one machine share its memory.
        gpu_share: part of a GPU that this worker may fill.
        margins: whether the study's estimator needs margins of generated answers.
        batch_found: whether ``batch_tokens`` is what an earlier run of the study found.
        factored: the experts are adapters that are merged as factors, never folded.
    """

    base: str
    experts: tuple[tuple[str, str], ...]
    dtype: str
    device: str
    threads: int
    tasks: tuple[TaskSpec, ...]
    include_paths: tuple[Path, ...]
    data_root: Path
    allow_task_code: bool
    batch_size: int
    batch_tokens: int | None = None
    residency: str = "auto"
    workers: int = 1
    gpu_share: float = 1.0
    goals: tuple[GoalSpec, ...] = ()
    margins: bool = False
    batch_found: bool = False
    factored: bool = False

    def __call__(self) -> ModelWorker:
        """Load the models and bind the tasks to them."""
        return ModelWorker(self)


class ModelWorker:
    """Applies recipes to a resident model and scores them.

    Args:
        spec: what to load.

    Raises:
        ModelError: the models cannot be used.
        TaskError: the tasks cannot be used.
        SetupError: the asked device is missing.
        InputError: the asked residency does not fit.
    """

    def __init__(self, spec: ModelWorkerFactory) -> None:
        import torch

        torch.set_num_threads(spec.threads)
        self._spec = spec
        self._device = choose_device(spec.device)
        models = open_models(spec.base, spec.experts)
        if spec.factored:
            models = factored(models)
        auto = scored_class(models.base.config)
        needs = Needs.of(models, spec.dtype)
        self._residency = choose(spec.residency, needs, measured_room(spec, self._device))
        with loading_turn():
            merger = Merger(models, spec.threads)
            merger.sources.require_finite()
            model = live_model(models, auto, spec.dtype, self._device)
            tokenizer = load_tokenizer(models.base.directory)
            self._engine = Engine(merger, model, self._residency)
            self._engine.require_base()
        self._merger, self._model, self._models = merger, model, models
        self._guard = Guard(model, self._engine.checksum)
        self._recipe: Recipe | None = None
        self._change: Change | None = None
        self._tokenizer = tokenizer
        self._goals = load_fitness(
            spec.tasks, spec.goals, spec.include_paths, spec.data_root, spec.allow_task_code,
            ("base", *(name for name, _ in spec.experts)), spec.margins,
        )  # fmt: skip
        self._fitness = self._attached(spec.batch_size, spec.batch_tokens, spec.batch_found)
        self._halved: Scorer | None = None  # made when memory runs out for the first time
        self._parameters = models.layout.parameters

    def run(self, job: Job) -> Evaluation:
        """Apply the recipe and score the items; with half the batch where memory runs out.

        Raises:
            EvaluationError: the weights changed while they were scored, twice.
        """
        self._require_sound()
        try:
            return self._measured(job, self._fitness)
        except Exception as error:
            if not out_of_memory(error):
                raise
            _LOG.warning("job %d: out of memory; once more with half the batch", job.number)
        self._free()
        if self._halved is None:
            from evomerge.fitness.text_scores import TOKENS

            spec = self._spec
            self._put("base")
            tokens = TOKENS if spec.batch_found else spec.batch_tokens or TOKENS
            self._halved = self._attached(max(1, spec.batch_size // 2), max(1, tokens // 2))
        try:
            return self._measured(job, self._halved)
        finally:
            self._free()

    def _measured(self, job: Job, scorer: Scorer) -> Evaluation:
        for _ in range(2):
            started = time.perf_counter()
            self._apply(job.recipe)
            merged = time.perf_counter()
            scores = run_job_items(job, scorer.score)
            seconds = {"merge": merged - started, "score": time.perf_counter() - merged}
            if self._guard.intact():
                return Evaluation(scores, seconds)
            _LOG.warning("job %d: the weights changed while they were scored", job.number)
            self._engine.forget()
        raise EvaluationError(
            "the weights in memory changed while they were scored, twice in a row; the memory of "
            "this machine may be failing"
        )

    def _require_sound(self) -> None:
        """Make anew what is not as it was left: the live model, or everything."""
        if not self._guard.intact():
            _LOG.warning("the live model changed between two trials; it is merged anew")
            self._engine.forget()
        if not self._guard.full_due():
            return
        if not self._guard.sources_intact():
            _LOG.warning("base or experts changed in memory; the models are loaded again")
            spec = self._spec
            self.__dict__.clear()  # the memory must be free before it is needed again
            release_memory()
            ModelWorker.__init__(self, spec)
        elif self._recipe is not None:
            before = self._guard.total()
            self._engine.forget()
            self._apply(self._recipe)
            if self._guard.total() != before:
                _LOG.warning("the live model was not what its recipe says; it was merged anew")

    def _free(self) -> None:
        """Give back what a failed scoring left behind; trust no weights after it."""
        self._engine.forget()
        release_memory()

    def _attached(self, batch_size: int, batch_tokens: int | None, found: bool = False) -> Scorer:
        return self._goals.attach(
            Live(
                self._model, self._tokenizer, batch_size, batch_tokens, self._put, self._distance,
                found, self._spec.gpu_share,
            )
        )  # fmt: skip

    def _apply(self, recipe: Recipe) -> None:
        """Write a merge into the live model."""
        self._engine.apply(recipe)
        self._guard.mark()
        self._recipe = recipe

    def _put(self, name: str) -> None:
        """Write the weights of the base or of an expert into the live model."""
        names = [expert.name for expert in self._models.experts]
        which = None if name == "base" else names.index(name)
        self._apply(alone(self._models, which, self._spec.dtype))

    def _distance(self, norm: str) -> float:
        """Return how far the live model is from the base: ``l1`` or ``l2``, see ``Live``."""
        assert self._recipe is not None
        if norm == "l1":
            return coefficient_norm(self._merger, self._recipe)
        if self._change is None:
            self._change = Change(self._merger, self._model)
        return self._change.relative()

    def describe(self) -> Mapping[str, str]:
        """Return where and how this worker merges and scores."""
        return {
            "device": str(self._device),
            "residency": str(self._residency),
            "kernels": self._engine.kernels,
            "dtype": self._spec.dtype,
            "threads": str(self._spec.threads),
            "batch_size": str(self._spec.batch_size),
            **self._fitness.facts(),
            "parameters": str(self._parameters),
        }


def release_memory() -> None:
    """Return what nobody uses any more to the device and the machine."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def measured_room(spec: ModelWorkerFactory, device: torch.device) -> Room:
    """Return the memory that is free for one worker, before it loads anything.

    For ``auto`` what is free now is divided among all workers that this machine can have: the
    others may not have begun yet. An explicit choice was judged so before they started; here
    only what this worker itself cannot have is refused.
    """
    import torch

    free: int | None = None
    if device.type == "cuda":
        left, total = torch.cuda.mem_get_info(device)
        free = min(left, int(total * spec.gpu_share))
    return Room(
        on_gpu=device.type == "cuda",
        device=free,
        host=available_bytes(),
        neighbours=neighbours(spec.workers, spec.threads) if spec.residency == "auto" else 1,
    )


def choose_device(wanted: str) -> torch.device:
    """Return the device for ``auto``, ``cpu`` or ``cuda``.

    Raises:
        SetupError: ``cuda`` was asked for and none is visible.
    """
    import torch

    if wanted == "cuda" and not torch.cuda.is_available():
        raise SetupError(
            "pool.device: no CUDA device is visible (use device: cpu, or gpus_per_worker)"
        )
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(wanted)


def auto_class(config: Mapping[str, Any]) -> str:
    """Return the transformers class that builds the live model of a config.

    Decided by the first of its ``architectures``. A body without a head
    counts as the language model around it, as it does for lm-eval.
    """
    name = str((config.get("architectures") or [""])[0])
    if name.endswith("ForImageClassification"):
        return "AutoModelForImageClassification"
    if name.endswith(("VisionModel", "VisionModelWithProjection", "CLIPModel", "ViTModel")):
        return "AutoModel"
    if name.endswith(("ForSequenceClassification", "ForTokenClassification", "ForMaskedLM")):
        return f"AutoModelFor{name.rpartition('For')[2]}"
    if config.get("is_encoder_decoder"):
        return "AutoModelForSeq2SeqLM"
    if name.endswith("ForConditionalGeneration"):
        return "AutoModelForImageTextToText"
    return "AutoModelForCausalLM"


def scored_class(config: Mapping[str, Any]) -> str:
    """Return the class of a model that lm-eval can score.

    Raises:
        ModelError: it is no language model; it can be merged, not searched with lm-eval.
    """
    auto = auto_class(config)
    if auto not in _SCORED:
        name = (config.get("architectures") or ["?"])[0]
        raise ModelError(
            f"models.base: {name} is no language model, which lm-eval could score "
            "(such models can be merged by recipe with `evomerge merge`, not searched)"
        )
    return auto


def load_tokenizer(directory: Path) -> Any:
    """Return the tokenizer of a model, a transformers one.

    Raises:
        ModelError: it is missing or broken.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            directory, trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # for a damaged file its readers raise whatever they come to
        raise ModelError(
            f"models.base: its tokenizer cannot be loaded: {one_line(error)} (put the tokenizer "
            f"files of the model into {directory})"
        ) from error


def live_model(models: Models, auto: str, dtype: str, device: torch.device) -> torch.nn.Module:
    """Return the base as a transformers model in evaluation mode."""
    import torch
    import transformers

    # It would be drawn into the study's own progress, once per worker.
    transformers.utils.logging.disable_progress_bar()
    try:
        model = getattr(transformers, auto).from_pretrained(
            models.base.directory,
            dtype=getattr(torch, _TORCH_DTYPES[dtype]),
            trust_remote_code=False,
            use_safetensors=True,
            local_files_only=True,
        )
    except (OSError, ValueError) as error:
        raise ModelError(f"models.base: transformers cannot load it: {error}") from error
    model.requires_grad_(False)
    live: torch.nn.Module = model.to(device).eval()
    return live
