"""The planted faults: mistakes of the kind that a change could make, one or more in every layer.

Each is a text that stands once in one file, and what it becomes. Where that file lies is not said: code that moves
takes its faults along. `plant.py` shows that the tests find each of them, `test_faults_apply.py` that each applies.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["FAULTS", "Fault", "find_tests", "place"]

_CPP = ("csrc/**/*",)
_PYTHON = ("torchintro/**/*.py", "benchmarks/**/*.py")


@dataclass(frozen=True)
class Fault:
    """One planted fault.

    Attributes:
        name: For the command line and the table.
        layer: The part of the project that is broken.
        broken: One sentence on what is broken.
        old: Text that stands once in one of the files looked at.
        new: What it becomes.
        tests: The test files likeliest to find it, by patterns of their paths, in the order in which they are run. A
            function or a class of the file may stand behind ``::``.
        where: Patterns of the files looked at.
    """

    name: str
    layer: str
    broken: str
    old: str
    new: str
    tests: tuple[str, ...]
    where: tuple[str, ...] = _PYTHON

    @property
    def is_compiled(self) -> bool:
        """Whether the extension must be built again."""
        return self.where == _CPP


def place(fault: Fault, root: Path) -> tuple[Path, str]:
    """Return the file of a checkout that a fault is planted in, and its text with the fault.

    Raises:
        LookupError: The old text does not stand once in one file, or the new text is the same.
    """
    paths = sorted({path for pattern in fault.where for path in root.glob(pattern) if path.is_file()})
    texts = {path: path.read_text(encoding="utf-8") for path in paths}
    found = {path: count for path, text in texts.items() if (count := text.count(fault.old))}
    if sum(found.values()) != 1:
        places = ", ".join(f"{path.relative_to(root)} ({count})" for path, count in found.items())
        looked = " and ".join(fault.where)
        raise LookupError(f"{fault.name}: its text must stand once in {looked}, but stands in: {places or 'no file'}")
    (path,) = found
    planted = texts[path].replace(fault.old, fault.new)
    if planted == texts[path]:
        raise LookupError(f"{fault.name}: its new text is the old one")
    return path, planted


def find_tests(fault: Fault, tests: Path) -> Iterator[str]:
    """Yield what pytest is to be given for the hints of a fault: first what is there as it is said, then mere files."""
    files = []
    for hint in fault.tests:
        pattern, _, name = hint.partition("::")
        for path in sorted(tests.rglob(pattern)):
            if name and re.search(rf"^(def|class) {name}\b", path.read_text(encoding="utf-8"), re.M) is None:
                files.append(str(path))
            else:
                yield hint.replace(pattern, str(path))
    yield from files


def _compiled(name: str, layer: str, broken: str, old: str, new: str, *tests: str) -> Fault:
    return Fault(name, layer, broken, old, new, tests, _CPP)


def _python(name: str, layer: str, broken: str, old: str, new: str, *tests: str) -> Fault:
    return Fault(name, layer, broken, old, new, tests)


FAULTS: tuple[Fault, ...] = (
    _compiled(
        "bias-gradient-sign",
        "kernels: few outputs",
        "The bias gradient has the wrong sign.",
        "db[o] += a.residual_scale * sum_lanes<double>(sum);",
        "db[o] -= a.residual_scale * sum_lanes<double>(sum);",
        "test_values.py",
    ),
    _compiled(
        "narrow-bias-lost",
        "kernels: few outputs",
        "The narrow kernel predicts without the bias.",
        "sum[q][r] = Vector<A>{} + (bias ? bias[q] : A(0));",
        "sum[q][r] = Vector<A>{};",
        "test_values.py",
    ),
    _compiled(
        "wide-bias-lost",
        "kernels: few outputs",
        "The wide kernel's residuals leave out the bias.",
        "const A b = bias ? bias[o] : A(0);",
        "const A b = A(0);",
        "test_values.py",
    ),
    _compiled(
        "share-of-rows-lost",
        "kernels: many outputs",
        "The weight gradient of the rows since the last whole share is lost.",
        "    if (sum_.defined()) {\n      end_share();\n      return sum_;",
        "    if (sum_.defined()) {\n      return sum_;",
        "test_many_outputs.py",
    ),
    _compiled(
        "tiles-rounded",
        "kernels: many outputs",
        "In bfloat16 the part of each tile in the weight gradient is rounded.",
        "tiles.wide_weight_gradient = size == 2 && (tiles.rows < rows || p.input.scalar_type() == at::kHalf);",
        "tiles.wide_weight_gradient = size == 2 && p.input.scalar_type() == at::kHalf;",
        "test_many_outputs.py::test_rows_sorted_by_target_lose_no_digits",
    ),
    _compiled(
        "half-of-the-squares",
        "kernels: many outputs",
        "The residual kernel's loss leaves out every second vector.",
        "partial[0] += sum_lanes<A>(squares + more_squares);",
        "partial[0] += sum_lanes<A>(squares);",
        "test_many_outputs.py",
    ),
    _compiled(
        "moments-unweighted",
        "kernels: moments",
        "The weights of the rows are left out of the second moments of wide inputs.",
        "s.left[r] * Memory<double>::load(s.right + r * s.stride + c));",
        "Memory<double>::load(s.right + r * s.stride + c));",
        "test_statistics.py::test_against_two_passes_in_float64",
    ),
    _compiled(
        "bias-shape-unchecked",
        "checks",
        "A bias of any shape is let through.",
        "CHECK_SHAPE(same_shape(linear_bias->sym_sizes(), weight_sizes.slice(0, 1), nullptr),",
        "CHECK_SHAPE(c10::SymBool(true),",
        "test_errors.py::test_bad_call",
    ),
    _compiled(
        "target-without-outputs",
        "checks",
        "A target of shape (N,) is let through.",
        "CHECK_SHAPE(same_shape(target.sym_sizes(), leading, &weight_sizes[0]),",
        "CHECK_SHAPE(same_shape(target.sym_sizes(), leading, target.dim() < input.dim() ? nullptr : &weight_sizes[0]),",
        "test_errors.py::test_bad_call",
    ),
    _compiled(
        "upstream-gradient-ignored",
        "autograd",
        "The gradients are not multiplied by the upstream gradient.",
        "double factor = *value;",
        "double factor = 1.0;",
        "test_autograd.py",
    ),
    _compiled(
        "bias-gradient-not-returned",
        "autograd",
        "The bias gets no gradient.",
        "linear_bias && linear_bias->requires_grad()};",
        "false};",
        "test_values.py",
    ),
    _compiled(
        "second-derivative-lost",
        "autograd",
        "With create_graph the gradients are numbers, not functions of the inputs.",
        "if (at::GradMode::is_enabled()) {",
        "if (false) {",
        "test_gradcheck.py",
    ),
    _compiled(
        "decomposed-weighted-mean",
        "decomposition",
        "The decomposed gradient of a weighted mean is not divided by the sum of the weights.",
        "g = at::div(g, weight_sum(factor, r));",
        "g = at::mul(g, 1);",
        "test_gradcheck.py",
        "test_transforms.py",
    ),
    _compiled(
        "meta-gradient-shape",
        "meta",
        "Without data, the input's gradient has the shape of the linear weight.",
        "gradient(kInput, input),",
        "gradient(kInput, linear_weight),",
        "test_transforms.py::test_meta_tensors",
    ),
    _compiled(
        "meta-shape-of-the-input",
        "meta",
        "Without data, the losses of the elements have the input's shape.",
        "? at::empty_symint(target.sym_sizes(), target.options())",
        "? at::empty_symint(input.sym_sizes(), target.options())",
        "test_transforms.py::test_meta_tensors",
    ),
    _compiled(
        "mean-over-rows",
        "scale of the problem",
        "The mean divides by the rows, not by the elements.",
        "p.loss_factor = mean && !weight ? 1.0 / count : 1.0;",
        "p.loss_factor = mean && !weight && count > 0 ? 1.0 / static_cast<double>(p.rows) : 1.0;",
        "test_values.py",
    ),
    _compiled(
        "weights-of-the-last-piece",
        "scale of the problem",
        "The weighted mean divides by the sum of the last piece of the weights.",
        "p.weight_sum.add_(at::sum(",
        "p.weight_sum.copy_(at::sum(",
        "test_values.py::test_the_sum_of_weights_over_many_pieces",
    ),
    _compiled(
        "momentum-lost",
        "fit operators",
        "The momentum buffer forgets what it held.",
        "const T buffer = u.first ? g : u.momentum * memory[0] + u.damped * g;",
        "const T buffer = u.first ? g : u.damped * g;",
        "test_full_batch_fit.py",
        "training/test_train.py",
    ),
    _compiled(
        "adam-bias-correction",
        "fit operators",
        "Adam's step is not corrected for moments that begin at zero.",
        "u.step = static_cast<T>(lr / (1 - beta1_power));",
        "u.step = static_cast<T>(lr);",
        "test_full_batch_fit.py",
        "training/test_train.py",
    ),
    _compiled(
        "validated-before-the-update",
        "fit operators",
        "The validation loss is that of the parameters before the epoch.",
        """\
      auto sum = at::zeros({run_.models}, doubles_);
      for (int64_t begin = 0; begin < run_.rows; begin += run_.batch_rows) {
        sum = train_batch(order, begin, std::min(begin + run_.batch_rows, run_.rows), sum);
      }
      assign(losses[e], began, sum.div(static_cast<double>(run_.rows)));
      if (validation) {
        const auto [loss, finite] = validate();
""",
        """\
      auto sum = at::zeros({run_.models}, doubles_);
      const auto before = validation ? validate() : Loss{};
      for (int64_t begin = 0; begin < run_.rows; begin += run_.batch_rows) {
        sum = train_batch(order, begin, std::min(begin + run_.batch_rows, run_.rows), sum);
      }
      assign(losses[e], began, sum.div(static_cast<double>(run_.rows)));
      if (validation) {
        const auto [loss, finite] = before;
""",
        "test_decomposed.py",
    ),
    _python(
        "betas-swapped",
        "training: optimizers",
        "Adam's two betas reach the operators in the wrong order.",
        'beta1, beta2 = map(float, values["betas"])',
        'beta2, beta1 = map(float, values["betas"])',
        "training/test_train.py::test_every_combination_follows_the_plain_loop",
    ),
    _python(
        "diverged-parameters-kept",
        "training: loop",
        "A run of the PyTorch loop that diverges leaves the parameters that are not finite.",
        "                        parameter.copy_(saved)\n",
        "                        pass\n",
        "test_fit.py::test_divergence_names_the_epoch_and_leaves_the_last_finite_parameters",
    ),
    _python(
        "float64-on-second-moments",
        "training: choice of engine",
        "A full batch in float64 is trained on second moments, of which digits are lost.",
        "if full and rows.dtype == torch.float64:",
        "if full and rows.dtype == torch.float64 and many_outputs:",
        "test_choice.py::test_auto_takes",
    ),
    _python(
        "between-term-lost",
        "statistics",
        "Merged statistics leave out the distance of the two means.",
        "self.sxx + sxx + torch.outer(x, x) * between,",
        "self.sxx + sxx,",
        "test_statistics.py::test_any_cut_gives_the_same",
    ),
    _python(
        "solution-without-intercept",
        "statistics",
        "The intercept of the closed form is the mean of the targets.",
        "return weight, self.mean_y - torch.mv(weight, self.mean_x)",
        "return weight, self.mean_y.clone()",
        "test_statistics.py::test_solve_against_scikit_learn",
    ),
    _python(
        "constant-column-scaled",
        "data: standardize",
        "A constant column is divided by a tiny number, not by 1.",
        "torch.where(constant | (scale == 0), torch.ones_like(scale), scale)",
        "torch.where(constant | (scale == 0), torch.full_like(scale, 1e-8), scale)",
        "test_datasets.py",
    ),
    _python(
        "split-leaks",
        "data: split",
        "The training part of a split in memory is all rows, those held out included.",
        "for mask in (~held_out, held_out))",
        "for mask in (held_out | ~held_out, held_out))",
        "test_datasets.py",
    ),
    _python(
        "part-leaks",
        "data: split",
        "The training part of a streamed table is all rows, those held out included.",
        "return below & (value >= np.uint64(part.low)) if part.low else below",
        "return below",
        "test_table.py::TestShares",
        "test_table.py",
    ),
    _python(
        "pass-leaks",
        "data: pass",
        "A pass gathers the rows held out for training too.",
        "for chosen in (mark, ~mark))",
        "for chosen in (mark, mark | ~mark))",
        "test_gather.py",
    ),
    _python(
        "shares-overlap",
        "data: tables",
        "Each process's share of a table ends with the first row of the next one's.",
        "first, last = (everything * k // world_size for k in (rank, rank + 1))",
        "first, last = (min(everything * k // world_size + k - rank, everything) for k in (rank, rank + 1))",
        "test_table.py::TestShares",
    ),
    _python(
        "row-read-again",
        "data: tables",
        "Reading on in a part of a table begins with the last row that was read.",
        "return a + int(there[start - 1]) + 1",
        "return a + int(there[start - 1])",
        "test_table.py::TestShares",
        "test_gather.py",
    ),
    _python(
        "pieces-counted-twice",
        "data: pass",
        "A pass that goes on after an interruption reads from the first row again.",
        '"start": gathered.rows,',
        '"start": 0,',
        "test_gather.py",
    ),
    _python(
        "row-number-off-by-one",
        "data: tables",
        "The row of a bad value is named by a number one too small.",
        "file.value(name, at), at + 1,",
        "file.value(name, at), at,",
        "test_table_errors.py",
    ),
    _python(
        "failed-trials-counted",
        "tuning",
        "Failed trials count as finished.",
        "states=(TrialState.COMPLETE, TrialState.PRUNED)))",
        "states=(TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)))",
        "test_trials.py::test_parameters_that_do_not_go_together_are_failed_trials",
    ),
    _python(
        "range-not-logarithmic",
        "tuning",
        "Ranges of the search space are never searched on a logarithmic scale.",
        "log = name in _LOGARITHMIC and low > 0",
        "log = False",
        "test_space.py::test_every_kind_of_parameter",
    ),
    _python(
        "r2-not-explained",
        "evaluation",
        "r2 is the share of the variance that is not explained.",
        "torch.where(by_spread, 1 - squared / spread, (squared == 0).double())",
        "torch.where(by_spread, squared / spread, (squared == 0).double())",
        "test_evaluation.py",
    ),
    _python(
        "predicts-while-training",
        "evaluation",
        "Models are applied in the mode that they are in.",
        "    model.eval()\n    try:\n",
        "    try:\n",
        "test_evaluation.py",
    ),
    _python(
        "names-out-of-order",
        "saving",
        "The names of the features come back in the reverse order.",
        'feature_names=tuple(content["feature_names"]),',
        'feature_names=tuple(reversed(content["feature_names"])),',
        "test_saving.py",
    ),
    _python(
        "divergence-exits-with-0",
        "command line",
        "A run that diverges has the exit code of success.",
        "BAD_INPUT, DIVERGED, INTERRUPTED = 2, 1, 130",
        "BAD_INPUT, DIVERGED, INTERRUPTED = 2, 0, 130",
        "cli/test_train_command.py::test_train_that_diverges",
    ),
    _python(
        "wrong-gradient-verified",
        "benchmark",
        "The benchmark verifies the loss only, and times an operator whose gradients are wrong.",
        "for name, error in found.items()\n",
        'for name, error in found.items() if name == "loss"\n',
        "test_measure.py::test_a_wrong_operator_fails_and_is_not_timed",
    ),
)
