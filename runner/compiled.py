"""The whole training step as one compiled function.

torch.compile refuses to differentiate a derivative, which forces in a loss ask for. But the step as
a whole, from parameters and batch to losses and gradients of the parameters, is a function without
anything left to differentiate: it is traced once, with sizes as symbols, and compiled by Inductor.
The eager step stays the reference; it also takes the batches that are too small to be general.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import hashlib
import io
import json
import math
import os
import pickle
import platform
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jaxtyping
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)

from runner.batches import Batch
from runner.errors import RunError
from runner.losses import Loss, Sum, Whole
from runner.potentials import Potential

TOLERANCE = 1e-3
ROUNDING = 10  # times as far from the step in double precision as the eager one is
# where Inductor of torch 2.13 reorders operations to save memory, or fuses them, some read what is
# not yet written; the step is checked, and compiled with fewer liberties if it is wrong
LIBERTIES: list[dict[str, Any]] = [
    {"reorder_for_peak_memory": False},
    {"reorder_for_peak_memory": False, "max_fusion_size": 1},
]
# a program in C++ lets other threads of Python run beside it; it has no threads of its own, which
# would cost the many small operations of a step more than they bring. Its operations and what calls
# them are two files, of which only the first is worth optimising, and has no lines to be debugged
ON_CPU: dict[str, Any] = {
    "cpp_wrapper": True,
    "cpp.threads": 1,
    "cpp_wrapper_build_separate": True,
    "aot_inductor.enable_line_tables": False,
}
PAIRS_IN_PART = 400  # what pairs have for features then stays in a core's cache
GENERAL_FROM = 2  # sizes of 0 and 1 are special to a compiler


@dataclass(frozen=True)
class StepResult:
    """What a training step gives; a compiled one has no graph but that of the total.

    Attributes:
        total: the weighted loss, to be differentiated by the parameters.
        sums: of every term of the loss.
        prediction: by name.
    """

    total: Tensor
    sums: dict[str, Sum]
    prediction: dict[str, Tensor]


class Step:
    """Predict and compare, operation by operation."""

    def __init__(self, potential: Potential, loss: Loss, derivatives: Mapping[str, bool]) -> None:
        """Take what is trained.

        Args:
            potential: that is trained.
            loss: that is minimised.
            derivatives: whether forces and stress are needed.
        """
        self.potential, self.loss, self.derivatives = potential, loss, dict(derivatives)

    def double(self) -> Step:
        """The same in double precision, on a CPU."""
        potential, loss = copy.deepcopy(self.potential), copy.deepcopy(self.loss)
        return Step(potential.cpu().double(), loss.cpu().double(), self.derivatives)

    def __call__(
        self, batch: Batch, weights: Mapping[str, Any], whole: Whole | None = None
    ) -> StepResult:
        """One batch, with the weights of the terms as they are now.

        Args:
            batch: of this process.
            weights: of the terms.
            whole: what the batches of several processes have, if the loss is over all of them.
        """
        return self.compare(self.potential(batch, **self.derivatives), batch, weights, whole)

    def compare(
        self,
        prediction: dict[str, Tensor],
        batch: Batch,
        weights: Mapping[str, Any],
        whole: Whole | None = None,
    ) -> StepResult:
        """What a prediction costs."""
        sums = self.loss.sums(prediction, batch)
        parts = sums if whole is None else whole.part(sums)
        total = self.loss.weighted({name: s.mean for name, s in parts.items()}, weights)
        if whole is not None:
            total = _Reaching.apply(total, *self.potential.parameters())  # type: ignore[no-untyped-call]
        return StepResult(total, sums, prediction)


class CompiledStep:
    """A step that is traced and compiled when it meets its first batch of general size.

    On a CPU, a batch is computed in parts of some hundred pairs, several at a time. Loss and
    gradients are sums over structures, once each term knows what it has to be divided by; the parts
    are those of the batch, whatever number of threads there is, and are added up in their order: so
    the numbers do not depend on the threads.
    """

    def __init__(
        self, step: Step, incomplete: Collection[str] = (), *, learns: bool = True
    ) -> None:
        """Compile a step.

        Args:
            step: of a potential in training mode; in evaluation mode, if it does not learn.
            incomplete: labels that some structure of the data lacks; a batch in which all have
                them is made to look like the others.
            learns: whether it gives gradients of the parameters too.
        """
        self.incomplete, self.learns = sorted(incomplete), learns
        self.use(step)
        self._function: Any = None
        self._layout: _Layout | None = None
        self._calls = 0
        self._aside: _Aside | None = None
        self.threads = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(self.threads, initializer=_alone)

    def use(self, step: Step) -> None:
        """Take the weights of another potential of the same kind from now on."""
        self.step = step
        self._parameters = dict(step.potential.named_parameters())
        self._buffers = dict(step.potential.named_buffers())

    def fits(self, batch: Batch) -> bool:
        """Whether the batch is of general size: two structures, atoms and pairs at least."""
        return _is_general(batch)

    def __call__(
        self, batch: Batch, weights: Mapping[str, float], whole: Whole | None = None
    ) -> StepResult:
        """The same as the eager step to rounding."""
        batch = _with_masks(batch, self.incomplete)
        if self._function is None:
            with _without_collecting_garbage():
                self._compile(batch, weights)
        self._calls += 1
        if self._calls & (self._calls - 1) == 0 and (wrong := self._compare(batch, weights)):
            raise _is_wrong(wrong)
        return self._compute(batch, weights, whole)

    def compile_aside(self, batch: Batch, weights: Mapping[str, float]) -> None:
        """Begin to compile in a process of its own, for the program to be there when it is needed.

        Nothing happens if it is there already, cannot be kept, or is one for a GPU.

        Args:
            batch: of the kind that it will be called with.
            weights: of the terms.
        """
        batch = _with_masks(batch, self.incomplete)
        if not self.begun and self.fits(batch) and batch.positions.device.type == "cpu":
            tries = self._tries(batch)
            if tries[0][1] is not None and not tries[0][1].is_dir():
                self._aside = _Aside(self.step, self.incomplete, self.learns, batch, weights, tries)

    @property
    def begun(self) -> bool:
        """Whether it is compiled, here or in a process of its own."""
        return self._function is not None or self._aside is not None

    @property
    def is_waited_for(self) -> bool:
        """Whether the next batch waits for a process that compiles."""
        return self._function is None and self._aside is not None and self._aside.runs

    def close(self) -> None:
        """Compile no more in the process that `compile_aside` has begun."""
        if self._aside is not None:
            self._aside.close()

    def _tries(self, batch: Batch) -> list[_Try]:
        """With what options it is compiled, one after the other, and where each program is kept."""
        on_cpu = ON_CPU if batch.positions.device.type == "cpu" else {}
        return [(o, self._place(batch, o)) for o in (free | on_cpu for free in LIBERTIES)]

    def _compile(
        self, batch: Batch, weights: Mapping[str, float], tries: Sequence[_Try] | None = None
    ) -> None:
        """Trace, and compile with as many liberties as are right.

        Raises:
            RunError: it cannot be compiled, or is wrong.
        """
        if self._aside is not None:
            self._aside.wait()
        traced: tuple[Any, list[Tensor]] | None = None
        for options, place in tries or self._tries(batch):
            known = None if place is None else _load(place, options)
            if known is None:
                factors = self._factors(batch, weights)
                traced = traced or self._trace(self._state(), factors, batch)
                self._function = _compiled(*traced, options)
                if place is not None:
                    assert self._layout is not None
                    _keep(place, self._function, self._layout)
            else:
                self._function, self._layout = known
            # a term that weighs nothing now is to be right later
            wrong = self._compare(batch, {name: weight or 1.0 for name, weight in weights.items()})
            if not wrong:
                return
        raise _is_wrong(wrong)

    def _place(self, batch: Batch, options: Mapping[str, Any]) -> Path | None:
        """Where the program is kept; None if it is made by code that may change unnoticed."""
        step, state = self.step, self._state()
        inputs: dict[int, Sequence[int]] = {id(t): t.shape for t in state}
        for parameter in self._parameters.values():
            inputs[id(parameter)] = (self.learns and parameter.requires_grad, *parameter.shape)
        inputs |= {id(t): _symbols(name, t) for name, t in _tensors(batch).items()}
        made_of = [
            *(step.potential, step.loss, step.derivatives, self.learns, self.incomplete, batch),
            *(dict(options), _machine(), *_settings()),
        ]
        text = io.BytesIO()
        try:
            _Pickler(text, inputs).dump(made_of)
        except (pickle.PicklingError, AttributeError, TypeError):
            return None
        return _programs() / hashlib.sha256(text.getvalue()).hexdigest()[:32]

    def _state(self) -> list[Tensor]:
        """Weights and what else the potential holds."""
        return [p.detach() for p in self._parameters.values()] + list(self._buffers.values())

    def _factors(
        self, batch: Batch, weights: Mapping[str, float], whole: Whole | None = None
    ) -> Tensor:
        """What the sum of each term is multiplied by: its weight over the number of its labels."""
        whole = whole or Whole(self.step.loss.counts(batch), 1)
        return torch.stack(
            [whole.n * weights[name] / whole.counts[name].clamp(min=1) for name in sorted(weights)]
        )

    def _compute(
        self, batch: Batch, weights: Mapping[str, float], whole: Whole | None = None
    ) -> StepResult:
        """Run the program on the parts of a batch, and add up."""
        assert self._layout is not None
        given = [*self._state(), self._factors(batch, weights, whole)]

        def run(part: Batch) -> list[Tensor]:
            with torch.no_grad():
                return list(self._function(*given, *_tensors(part).values()))

        parts = self._parts(batch)
        found = list(self._pool.map(run, parts))
        total, sums, prediction, gradient = self._layout.joined(found)
        if gradient is not None:
            total = _Given.apply(total, gradient, *self._parameters.values())  # type: ignore[no-untyped-call]
        return StepResult(total, sums, prediction)

    def _parts(self, batch: Batch) -> list[Batch]:
        """The batch in an even number of parts, or as it is, on other devices or if it is small."""
        n_pairs = batch.half_pairs.shape[1]
        if batch.positions.device.type != "cpu" or n_pairs < PAIRS_IN_PART // 2:
            return [batch]
        n = 2 * -(-n_pairs // (2 * PAIRS_IN_PART))
        # large structures are parts by themselves: the program counts structures, nothing more
        least = 1 if n_pairs > PAIRS_IN_PART * batch.n_atoms.shape[0] else GENERAL_FROM
        parts = batch.parts(n, least)
        return parts if all(_is_general(part, least) for part in parts) else [batch]

    def _trace(
        self,
        state: Sequence[Tensor],
        factors: Tensor,
        batch: Batch,
    ) -> tuple[Any, list[Tensor]]:
        """The step as a graph of operations, and stand-ins for what it takes."""
        tensors = _tensors(batch)
        mode = FakeTensorMode(shape_env=ShapeEnv(duck_shape=False))
        inputs: list[Tensor] = [mode.from_tensor(t, static_shapes=True) for t in (*state, factors)]
        inputs += [_symbolic(mode, name, tensor) for name, tensor in tensors.items()]
        n_parameters, n_state = len(self._parameters), len(state)
        names = [*self._parameters, *self._buffers]

        def function(*given: Tensor) -> list[Tensor]:
            parameters = [p.detach().requires_grad_(self.learns) for p in given[:n_parameters]]
            known = dict(zip(names, [*parameters, *given[n_parameters:n_state]], strict=True))
            here = _batch(batch, dict(zip(tensors, given[n_state + 1 :], strict=True)))
            prediction = functional_call(self.step.potential, known, here, self.step.derivatives)
            sums = self.step.loss.sums(prediction, here)
            weighted = zip(sorted(sums), given[n_state].unbind(), strict=True)
            total = torch.stack([factor * sums[name].total for name, factor in weighted]).sum()
            self._layout = _Layout(list(sums), list(prediction))
            packed = self._layout.pack(StepResult(total, sums, prediction))
            if self.learns:
                gradients = torch.autograd.grad(
                    total, parameters, allow_unused=True, materialize_grads=True
                )
                packed.append(torch.cat([gradient.flatten() for gradient in gradients]))
            return [tensor.detach() for tensor in packed]

        with _shapes_unchecked():
            return make_fx(function, tracing_mode="symbolic")(*inputs), inputs

    def _compare(self, batch: Batch, weights: Mapping[str, float]) -> str:
        """How the compiled step differs from the eager one on a batch; empty if it does not.

        Of a large batch some parts are compared, so that the eager step needs little memory. A loss
        of almost 0 is the square of what rounding leaves of almost equal numbers: there the two
        differ by more, and the step in double precision tells how much rounding does.
        """
        some = batch.parts(-(-batch.half_pairs.shape[1] // (2 * PAIRS_IN_PART)), GENERAL_FROM)[0]
        batch = some if _is_general(some) else batch
        eager = self._numbers(self.step(batch, weights), self._parameters)
        if not eager[0].isfinite():  # said elsewhere
            return ""
        compiled = self._numbers(self._compute(batch, weights), self._parameters)
        off = _off(compiled, eager)
        if max(off) <= TOLERANCE:
            return ""
        step = self.step.double()
        parameters = dict(step.potential.named_parameters())
        exact = self._numbers(step(batch.to("cpu").double(), weights), parameters)
        if max(_off(compiled, exact)) <= ROUNDING * max(_off(eager, exact)):
            return ""
        what = "gradients" if self.learns else "predictions"
        return (
            f"its loss is {compiled[0].item():.6g} instead of {eager[0].item():.6g}, its {what} "
            f"are off by {off[1]:.2g} of the largest"
        )

    def _numbers(self, result: StepResult, parameters: Mapping[str, Tensor]) -> list[Tensor]:
        """The loss, and its gradients or what is predicted; 0 for what cannot be."""
        if not self.learns:
            values = [result.prediction[name].nan_to_num() for name in sorted(result.prediction)]
        else:
            values = list(
                torch.autograd.grad(
                    result.total,
                    list(parameters.values()),
                    allow_unused=True,
                    materialize_grads=True,
                )
            )
        return [number.detach().cpu().double() for number in (result.total, *values)]


_Try = tuple[dict[str, Any], Path | None]
"""Options of the compiler, and where the program that they make is kept, if it is."""

COMPILE = "from runner.compiled import compile_for_another as compile; compile()"


class _Aside:
    """A process that compiles a step, for this one to find the program where it is kept."""

    def __init__(self, *task: Any) -> None:
        """Begin, if the task can be handed over; see `compile_for_another`."""
        self._process: subprocess.Popen[bytes] | None = None
        with contextlib.suppress(pickle.PicklingError, AttributeError, TypeError, OSError):
            text = pickle.dumps((_settings(), task))
            quiet: Any = dict.fromkeys(("stdout", "stderr"), subprocess.DEVNULL)
            with tempfile.TemporaryFile() as file:
                file.write(text)
                file.seek(0)
                # in a session of its own, where Ctrl-C does not reach it
                self._process = subprocess.Popen(
                    [sys.executable, "-Pc", COMPILE], stdin=file, start_new_session=True, **quiet
                )

    @property
    def runs(self) -> bool:
        """Whether it has not ended."""
        return self._process is not None and self._process.poll() is None

    def wait(self) -> None:
        """Until it has ended; whether it has made a program is seen where that is kept."""
        if self._process is not None:
            self._process.wait()

    def close(self) -> None:
        """End it.

        A compiler that it has started ends what it writes, some seconds later: half a file would be
        in the way of the next one.
        """
        if self._process is not None:
            self._process.terminate()
        self.wait()


def compile_for_another() -> None:
    """Compile what another process asks for, which finds the program where it is kept.

    On the standard input comes what `_Aside` has pickled: settings of torch, and the step, its
    labels that may be missing, whether it learns, a batch, weights, and options with their places.
    """
    (deterministic, fills, dtype, precision), task = pickle.load(sys.stdin.buffer)
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = fills  # type: ignore[attr-defined]
    torch.set_default_dtype(dtype)
    torch.set_float32_matmul_precision(precision)
    torch.set_num_threads(1)
    step, incomplete, learns, batch, weights, tries = task
    with _without_collecting_garbage():
        CompiledStep(step, incomplete, learns=learns)._compile(batch, weights, tries)


@contextlib.contextmanager
def _without_collecting_garbage() -> Iterator[None]:
    """Looking for some among the millions of objects that a compiler makes takes its time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _off(numbers: list[Tensor], reference: list[Tensor]) -> tuple[float, float]:
    """How far the loss is from the reference, and the other numbers in shares of the largest."""
    loss, *others = ((a - b).abs() for a, b in zip(numbers, reference, strict=True))
    largest = max(float(number.abs().max()) for number in reference[1:])
    furthest = max(float(other.max()) for other in others)
    return _share(float(loss), float(reference[0].abs())), _share(furthest, largest)


def _share(part: float, whole: float) -> float:
    return part / whole if whole else math.inf * part if part else 0.0


def _alone() -> None:
    """What a thread that computes parts needs: no threads below it, no numbers near zero.

    Numbers below 1e-38 change no sum, and cost a processor a hundred times as much as others.
    """
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)


def _is_general(batch: Batch, structures: int = GENERAL_FROM) -> bool:
    """Whether it has so many structures, and two atoms and pairs at least."""
    sizes = [batch.positions.shape[0], batch.half_pairs.shape[1]]
    sizes += [] if batch.half_near is None else [batch.half_near.shape[0]]
    return batch.n_atoms.shape[0] >= structures and min(sizes) >= GENERAL_FROM


def _is_wrong(how: str) -> RunError:
    return RunError(
        f"the compiled step does not give what the step itself does: {how}",
        where="train.compile",
        remedy="set it to false; another version of torch may help",
    )


def _compiled(graph: Any, inputs: Sequence[Tensor], options: Mapping[str, Any]) -> Any:
    """A graph as a program.

    Raises:
        RunError: there is no compiler, or it fails.
    """
    with _shapes_unchecked(), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch about itself
        from torch._inductor import config, standalone_compile  # takes a second to import

        try:
            with torch.no_grad(), config.patch(_known(options)):
                return standalone_compile(graph, list(inputs))
        except Exception as error:  # compilers fail in many ways
            raise RunError(
                f"the training step cannot be compiled: {str(error).strip().splitlines()[0]}",
                where="train.compile",
                remedy="set it to false; on a CPU a C++ compiler such as g++ is needed",
            ) from error


def _known(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those options that this version of torch has."""
    from torch._inductor import config

    return {name: value for name, value in options.items() if hasattr(config, name)}


class _Pickler(pickle.Pickler):
    """Writes what a program is made of: everything but the numbers that it is given.

    Raises:
        pickle.PicklingError: some of it is code of neither this package, torch nor Python, of which
            the installed version tells nothing.
    """

    def __init__(self, file: io.BytesIO, inputs: Mapping[int, Sequence[int]]) -> None:
        """Write to a file.

        Args:
            file: to write to.
            inputs: what is to be known of each tensor that the program is given, by its `id`.
        """
        super().__init__(file, protocol=5)
        self.inputs = inputs

    def persistent_id(self, obj: object) -> Any:
        """Describe a tensor; and a set, whose order is another one in each process."""
        if isinstance(obj, set | frozenset):
            return ("set", *sorted(repr(element) for element in obj))
        if not isinstance(obj, Tensor):
            return None
        kind = (str(obj.dtype), str(obj.device), type(obj).__name__)
        if id(obj) in self.inputs:
            return (*kind, *self.inputs[id(obj)])
        values = obj.detach().cpu().numpy().tobytes()
        return (*kind, obj.requires_grad, tuple(obj.shape), values)

    def reducer_override(self, obj: object) -> Any:
        """Refuse code that may change unnoticed."""
        if isinstance(obj, type) or callable(obj):
            root = (getattr(obj, "__module__", None) or "").partition(".")[0]
            if root not in {"runner", "torch", "jaxtyping"} | sys.stdlib_module_names:
                raise pickle.PicklingError(f"{obj} is of {root}")
        return NotImplemented


def _machine() -> list[str]:
    """The versions of everything that makes a program, and the processor that it is made for."""
    code = hashlib.sha256()
    for file in sorted(Path(__file__).parent.rglob("*.py")):
        code.update(file.read_bytes())
    processor = [platform.machine(), torch.backends.cpu.get_cpu_capability()]
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        processor += sorted({line for line in lines if line.startswith(("model name", "flags"))})
    settings = [
        f"{name}={value}"
        for name, value in sorted(os.environ.items())
        if name == "CXX" or (name.startswith("TORCH") and not name.endswith("CACHE_DIR"))
    ]
    return [code.hexdigest(), sys.version, torch.__version__, *processor, *settings]


def _settings() -> tuple[bool, bool, torch.dtype, str]:
    """Of torch, what a program depends on."""
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
        torch.get_default_dtype(),
        torch.get_float32_matmul_precision(),
    )


def _programs() -> Path:
    """The folder in which programs are kept, beside Inductor's own."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir()) / "runner"


def _load(place: Path, options: Mapping[str, Any]) -> tuple[Any, _Layout] | None:
    """A program that is kept, and how its results lie; None if there is none that can be read."""
    if not place.is_dir():
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch about itself
        from torch._inductor import config
        from torch._inductor.standalone_compile import CompiledArtifact

        try:
            layout = _Layout(**json.loads((place / "layout.json").read_text(encoding="utf-8")))
            with torch.no_grad(), config.patch(_known(options)):
                return CompiledArtifact.load(path=str(place / "program")), layout
        except Exception:  # whatever is wrong with it, it can be made again
            shutil.rmtree(place, ignore_errors=True)
            return None


def _keep(place: Path, program: Any, layout: _Layout) -> None:
    """Keep a program for the next training, if it can be written."""
    with contextlib.suppress(Exception):  # a training goes on without
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent, ignore_cleanup_errors=True) as aside:
            program.save(path=f"{aside}/program")
            Path(aside, "layout.json").write_text(json.dumps(asdict(layout)), encoding="utf-8")
            Path(aside).rename(place)


@dataclass(frozen=True)
class _Layout:
    """How results lie in one flat list."""

    terms: list[str]
    quantities: list[str]

    def pack(self, result: StepResult) -> list[Tensor]:
        sums = [
            t for name in self.terms for t in (result.sums[name].total, result.sums[name].count)
        ]
        return [result.total, *sums, *result.prediction.values()]

    def joined(
        self, parts: Sequence[list[Tensor]]
    ) -> tuple[Tensor, dict[str, Sum], dict[str, Tensor], Tensor | None]:
        """Sums and gradients, if there are any, added up, predictions one after the other."""
        first = 1 + 2 * len(self.terms)
        last = first + len(self.quantities)
        numbers = torch.stack([torch.stack(part[:first]) for part in parts]).sum(0).unbind()
        pairs = zip(numbers[1::2], numbers[2::2], strict=True)
        sums = {name: Sum(*pair) for name, pair in zip(self.terms, pairs, strict=True)}
        rows = zip(*(part[first:last] for part in parts), strict=True)
        predicted = {n: torch.cat(r) for n, r in zip(self.quantities, rows, strict=True)}
        gradient = None
        if len(parts[0]) > last:
            gradient = parts[0][last]
            for part in parts[1:]:
                gradient += part[last]
        return numbers[0], sums, predicted, gradient


class _Given(torch.autograd.Function):
    """A loss whose gradient is known already, that of all parameters one after the other."""

    @staticmethod
    def forward(ctx: Any, total: Tensor, gradient: Tensor, *parameters: Tensor) -> Tensor:
        ctx.gradient, ctx.parameters = gradient, parameters
        return total.clone()

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Any:
        (slope,) = slopes
        parts = (slope * ctx.gradient).split([parameter.numel() for parameter in ctx.parameters])
        given = [
            part.view_as(parameter) if parameter.requires_grad else None
            for part, parameter in zip(parts, ctx.parameters, strict=True)
        ]
        return None, None, *given


class _Reaching(torch.autograd.Function):
    """A loss from which every parameter is reached, some perhaps without a gradient.

    Several processes wait for each other's gradient of every parameter, and one of them may have a
    batch of no structure.
    """

    @staticmethod
    def forward(ctx: Any, total: Tensor, *parameters: Tensor) -> Tensor:
        ctx.n = len(parameters)
        return total.clone()

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Any:
        return *slopes, *[None] * ctx.n


def _with_masks(batch: Batch, names: Sequence[str]) -> Batch:
    """The batch with a mask for every label that some structure of the data lacks."""
    every = torch.ones_like(batch.n_atoms, dtype=torch.bool)
    masks = {name: batch.labelled.get(name, every) for name in names if name in batch.labels}
    return replace(batch, labelled=masks)


def _tensors(batch: Batch) -> dict[str, Tensor]:
    """All tensors of a batch by name, always in the same order."""
    found = {name: value for name, value in vars(batch).items() if isinstance(value, Tensor)}
    found |= {f"label {name}": batch.labels[name] for name in sorted(batch.labels)}
    return found | {f"has {name}": batch.labelled[name] for name in sorted(batch.labelled)}


def _batch(like: Batch, tensors: Mapping[str, Tensor]) -> Batch:
    """A batch of other tensors."""
    plain = {name: tensor for name, tensor in tensors.items() if " " not in name}
    labels = {name: tensors[f"label {name}"] for name in like.labels}
    labelled = {name: tensors[f"has {name}"] for name in like.labelled}
    return replace(like, **plain, labels=labels, labelled=labelled)


def _symbols(name: str, tensor: Tensor) -> list[int]:
    """The shape of a tensor of a batch, -1 for its number of structures, atoms or pairs."""
    sizes = list(tensor.shape)
    sizes[1 if name == "half_pairs" else 0] = -1
    return sizes


def _symbolic(mode: FakeTensorMode, name: str, tensor: Tensor) -> Tensor:
    """A stand-in whose number of structures, atoms or pairs is a symbol."""
    sizes = [DimDynamic.DYNAMIC if n < 0 else DimDynamic.STATIC for n in _symbols(name, tensor)]
    # one tensor under two names, such as a mask of all, would be one input; the next time it is two
    alone = tensor.clone()
    return mode.from_tensor(alone, symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes))


@contextlib.contextmanager
def _shapes_unchecked() -> Iterator[None]:
    """Without comparing shapes, which would turn symbols into numbers."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", before)
