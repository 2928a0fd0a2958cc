// linear_mse_fit on the CPU: the loop around the few-outputs kernel.
//
// Per batch: loss and gradients of all models from one reading of its rows, in blocks of rows; then the updates. Blocks are
// fixed by the sizes and added in block order, so that the result does not depend on the number of threads.
// Bytes an epoch: X and the target once, as long as a block's part of X and the models' weights stay in the second-level
// cache. Operations: 4 N D O K.
#include "cpu/call.h"
#include "fit/cpu/models.h"
#include "fit/cpu/team.h"
#include "fit/decomposed.h"

#include <torch/library.h>

#include <vector>

namespace torchintro::fit {
namespace {

using cpu::FewOutputs;
using cpu::ScratchMemory;

// Outputs that the kernel is given at a time: a register tile of the weight gradient has eight.
constexpr int64_t kOutputsAtOnce = 8;
// Rows that all models' kernels work on before the next ones are read: in half of a second-level cache.
constexpr int64_t kPieceBytes = int64_t{256} << 10;
constexpr int64_t kFewestPieceRows = 64;
// A block should be worth a meeting of the threads, which takes about as long as 8192 multiplications and additions.
constexpr int64_t kOperationsPerBlock = 16384;
constexpr int64_t kFewestBlockRows = 64;
constexpr int64_t kMostBlocks = 64;
// An epoch of fewer operations is over before a second thread has woken.
constexpr int64_t kOperationsPerEpoch = int64_t{1} << 19;
// Rows that are asked for ahead of being copied, where their order is random.
constexpr int64_t kRowsAhead = 16;

template <typename T>
struct Rows {
  const T* x;
  int64_t x_stride, x_column_stride;
  const T* y;
  int64_t y_stride, y_column_stride;
  int64_t count;

  Rows(const at::Tensor& input, const at::Tensor& target)
      : x(input.const_data_ptr<T>()),
        x_stride(input.stride(0)),
        x_column_stride(input.stride(1)),
        y(target.const_data_ptr<T>()),
        y_stride(target.stride(0)),
        y_column_stride(target.stride(1)),
        count(input.size(0)) {}
};

template <typename T>
class Loop {
 public:
  explicit Loop(const RowsRun& run)
      : run_(run),
        models_(run),
        kernels_(cpu::find_kernels(cpu::dtype_of(run.input), cpu::dtype_of(run.input))),
        train_(run.input, run.target),
        d_(run.in_features),
        o_(run.out_features),
        group_(std::max<int64_t>(1, kOutputsAtOnce / run.out_features)),
        groups_((run.models + group_ - 1) / group_),
        sums_(1 + run.out_features + run.out_features * run.in_features),
        piece_rows_(count_piece_rows(run.in_features)),
        threads_(1) {
    FewOutputs call{};
    call.in_features = d_;
    call.out_features = group_ * o_;
    call.wants_weight_gradient = true;
    scratch_bytes_ = few_outputs_scratch_bytes(call);
    blocks_ = count_blocks(run.batch_rows);
    const int64_t operations = run.rows * d_ * o_ * run.models;
    if (operations >= kOperationsPerEpoch) {
      threads_ = std::min<int64_t>(at::get_num_threads(), std::max(blocks_, groups_));
    }
    by_groups_ = blocks_ < std::min(threads_, groups_);
    if (run.validation_input.defined()) {
      validation_.emplace(run.validation_input, run.validation_target);
    }
    most_blocks_ = std::max(blocks_, validation_ ? count_blocks(validation_->count) : 1);
    partial_.resize(most_blocks_ * run.models * sums_);
    for (int64_t i = 0; i < threads_; ++i) {
      members_.emplace_back(*this);
    }
  }

  Losses run() {
    auto results = no_losses(run_, validation_.has_value());
    losses_ = std::get<0>(results).template mutable_data_ptr<double>();
    validation_losses_ = std::get<1>(results).template mutable_data_ptr<double>();
    for (int64_t epoch = 0; epoch < run_.epochs; ++epoch) {
      order_ = run_.shuffle ? draw_order(run_) : at::Tensor();
      const int64_t* order = run_.shuffle ? order_.const_data_ptr<int64_t>() : nullptr;
      if (by_groups_ && !at::in_parallel_region() && threads_ > 1) {
        at::parallel_for(0, threads_, 1, [&](int64_t begin, int64_t end) {
          run_epoch(Member{}, begin, groups_ * begin / threads_, groups_ * end / threads_, epoch, order);
        });
      } else {
        run_team(threads_, [&](const Member& member) { run_epoch(member, member.begin, 0, groups_, epoch, order); });
      }
    }
    return results;
  }

 private:
  // What a thread needs for itself.
  struct Own {
    explicit Own(const Loop& loop)
        : scratch(loop.scratch_bytes_ + 64),
          x(loop.run_.shuffle ? loop.piece_rows_ * loop.d_ + 64 : 0),
          y(loop.run_.shuffle ? loop.piece_rows_ * loop.o_ : 0),
          piece_sums(loop.group_ * loop.sums_),
          gradient(loop.models_.parameters()),
          running(loop.run_.models),
          mean(loop.run_.models) {}

    std::vector<std::byte> scratch;
    std::vector<T> x, y; // gathered rows
    std::vector<double> piece_sums;
    std::vector<T> gradient;
    std::vector<char> running; // by model; every thread finds out for itself, from the same sums
    std::vector<double> mean; // by model: the epoch's loss
  };

  static int64_t count_piece_rows(int64_t features) {
    const int64_t rows = kPieceBytes / (static_cast<int64_t>(sizeof(T)) * features);
    return std::clamp<int64_t>(rows / kFewestPieceRows * kFewestPieceRows, kFewestPieceRows, 4096);
  }

  int64_t count_blocks(int64_t rows) const {
    const int64_t by_work = rows * d_ * o_ * run_.models / kOperationsPerBlock;
    const int64_t most = std::clamp<int64_t>((int64_t{4} << 20) / (8 * sums_ * run_.models), 1, kMostBlocks);
    return std::clamp<int64_t>(std::min(by_work, rows / kFewestBlockRows), 1, most);
  }

  // An epoch of the models of groups [group_begin, group_end). The members of a team have the same groups.
  void run_epoch(
      const Member& member, int64_t seat, int64_t group_begin, int64_t group_end, int64_t epoch, const int64_t* order) {
    Own& own = members_[seat];
    const int64_t first = group_begin * group_, last = std::min(run_.models, group_end * group_);
    for (int64_t k = first; k < last; ++k) {
      own.running[k] = !models_.has_stopped(k);
      own.mean[k] = 0;
    }
    member.wait(); // until all have looked
    int64_t step = run_.step + epoch * run_.batches();
    for (int64_t begin = 0; begin < run_.rows; begin += run_.batch_rows, ++step) {
      const int64_t rows = std::min(run_.batch_rows, run_.rows - begin);
      const int64_t blocks = std::min(blocks_, count_blocks(rows));
      sum_blocks(own, member, train_, order, begin, rows, blocks, group_begin, group_end, true);
      member.wait();
      for (int64_t k = first; k < last; ++k) {
        if (own.running[k]) {
          finish_step(own, member, k, first, last, epoch, step, rows, blocks);
        }
      }
      member.wait();
    }
    const bool leads = member.begin == 0;
    if (validation_) {
      const int64_t blocks = count_blocks(validation_->count);
      sum_blocks(own, member, *validation_, nullptr, 0, validation_->count, blocks, group_begin, group_end, false);
      member.wait();
      for (int64_t k = first; k < last; ++k) {
        if (own.running[k]) {
          const double loss = loss_of(k, validation_->count, blocks);
          if (leads) {
            validation_losses_[epoch * run_.models + k] = shown(loss);
          }
          if (!std::isfinite(static_cast<T>(loss))) {
            stop(member, k, first, last, epoch, step);
          }
        }
      }
      member.wait();
    }
    for (int64_t k = first; leads && k < last; ++k) {
      if (own.running[k]) {
        losses_[epoch * run_.models + k] = own.mean[k];
      }
    }
  }

  // The sums of this member's blocks of rows [begin, begin + rows), which count through `order` where there is one.
  void sum_blocks(
      Own& own,
      const Member& member,
      const Rows<T>& from,
      const int64_t* order,
      int64_t begin,
      int64_t rows,
      int64_t blocks,
      int64_t group_begin,
      int64_t group_end,
      bool gradient) {
    const int64_t block_rows = (rows + blocks - 1) / blocks;
    const int64_t last = member.last(blocks);
    for (int64_t block = member.first(blocks); block < last; ++block) {
      const int64_t row_begin = std::min(rows, block * block_rows), row_end = std::min(rows, row_begin + block_rows);
      for (int64_t row = row_begin; row == row_begin || row < row_end; row += piece_rows_) {
        const int64_t end = std::min(row_end, row + piece_rows_);
        FewOutputs call{};
        call.in_features = d_;
        call.residual_scale = 2.0 / (static_cast<double>(rows) * static_cast<double>(o_));
        call.wants_weight_gradient = gradient && run_.train_weight;
        int64_t kernel_begin = begin + row, kernel_end = begin + end;
        if (order != nullptr) {
          const bool ends = end == row_end && block + 1 == last;
          const int64_t next = kernel_end + (ends ? rows - (last - member.first(blocks)) * block_rows : 0);
          gather(own, from, order, kernel_begin, kernel_end, next);
          call.input = {own.x.data(), d_, 1};
          call.target = {own.y.data(), o_, 1};
          call.rows = end - row;
          kernel_begin = 0;
          kernel_end = end - row;
        } else {
          call.input = {from.x, from.x_stride, from.x_column_stride};
          call.target = {from.y, from.y_stride, from.y_column_stride};
          call.rows = from.count;
          // In the next batch this member has the same part again.
          call.rows_between =
              end == row_end && block + 1 == last ? rows - (last - member.first(blocks)) * block_rows : 0;
        }
        for (int64_t group = group_begin; group < group_end; ++group) {
          run_kernel(own, call, group, kernel_begin, kernel_end, block, row == row_begin, order == nullptr);
        }
      }
    }
  }

  // Adds to a block's sums, or begins them.
  void run_kernel(
      Own& own, FewOutputs& call, int64_t group, int64_t begin, int64_t end, int64_t block, bool fresh, bool ahead) {
    const int64_t model = group * group_, models = std::min(group_, run_.models - model);
    bool running = false;
    for (int64_t k = model; k < model + models; ++k) {
      running |= own.running[k] != 0;
    }
    if (!running) {
      return;
    }
    call.linear_weight = models_.weight(model);
    call.linear_bias = models_.bias(model);
    call.models = models;
    call.out_features = models * o_;
    // Only the last group asks for the rows to come: the others' would be gone before they are used.
    const int64_t rows = call.rows;
    if (!ahead || group + 1 < groups_) {
      call.rows = 0;
    }
    double* const to = partial_.data() + (block * run_.models + model) * sums_;
    void* const scratch = aligned(own.scratch.data());
    kernels_.few_outputs(call, begin, end, fresh ? to : own.piece_sums.data(), scratch);
    call.rows = rows;
    const int64_t size = models * (1 + o_ + (call.wants_weight_gradient ? o_ * d_ : 0));
    for (int64_t i = 0; !fresh && i < size; ++i) {
      to[i] += own.piece_sums[i];
    }
  }

  static void* aligned(std::byte* memory) {
    const auto address = reinterpret_cast<uintptr_t>(memory);
    return memory + (cpu::kScratchAlignment - address % cpu::kScratchAlignment) % cpu::kScratchAlignment;
  }

  // Rows order[begin .. end), side by side. Each is a page of its own, whose address takes as long to find as the row itself:
  // asked for early, those that this member goes on with (from `next` on) too.
  void gather(Own& own, const Rows<T>& from, const int64_t* order, int64_t begin, int64_t end, int64_t next) {
    constexpr int64_t line = 64 / static_cast<int64_t>(sizeof(T));
    T* x = own.x.data();
    T* y = own.y.data();
    for (int64_t i = begin; i < end; ++i) {
      const int64_t ahead = i + kRowsAhead + (i + kRowsAhead < end ? 0 : next - end);
      if (ahead < from.count) {
        const T* row = from.x + order[ahead] * from.x_stride;
        for (int64_t d = 0; d < d_; d += line) {
          __builtin_prefetch(row + d * from.x_column_stride);
        }
        __builtin_prefetch(from.y + order[ahead] * from.y_stride);
      }
      const T* row = from.x + order[i] * from.x_stride;
      if (from.x_column_stride == 1) {
        std::memcpy(x, row, static_cast<size_t>(d_) * sizeof(T));
      } else {
        for (int64_t d = 0; d < d_; ++d) {
          x[d] = row[d * from.x_column_stride];
        }
      }
      x += d_;
      const T* target = from.y + order[i] * from.y_stride;
      for (int64_t o = 0; o < o_; ++o) {
        *y++ = target[o * from.y_column_stride];
      }
    }
  }

  // Where a model's sums lie: those of a group are the losses of its models, their bias gradients, their weight gradients.
  struct Place {
    int64_t loss, bias, weight;
  };
  Place place(int64_t model) const {
    const int64_t first = model / group_ * group_, models = std::min(group_, run_.models - first), i = model - first;
    const int64_t start = first * sums_;
    return {start + i, start + models + i * o_, start + models * (1 + o_) + i * o_ * d_};
  }

  double loss_of(int64_t model, int64_t rows, int64_t blocks) const {
    double squares = 0;
    for (int64_t block = 0; block < blocks; ++block) {
      squares += partial_[block * run_.models * sums_ + place(model).loss];
    }
    return squares / (static_cast<double>(rows) * static_cast<double>(o_));
  }

  // Infinite where it is that in the parameters' dtype.
  static double shown(double loss) {
    const T rounded = static_cast<T>(loss);
    return std::isfinite(rounded) ? loss : static_cast<double>(rounded);
  }

  // This member's elements of a model's parameters: all members together have those of models [first, last) once.
  std::pair<int64_t, int64_t> share(const Member& member, int64_t model, int64_t first, int64_t last) const {
    const int64_t size = models_.parameters(), all = (last - first) * size, start = (model - first) * size;
    return {
        std::clamp<int64_t>(member.first(all) - start, 0, size),
        std::clamp<int64_t>(member.last(all) - start, 0, size)};
  }

  void finish_step(
      Own& own,
      const Member& member,
      int64_t model,
      int64_t first,
      int64_t last,
      int64_t epoch,
      int64_t step,
      int64_t rows,
      int64_t blocks) {
    const double loss = loss_of(model, rows, blocks);
    if (!std::isfinite(static_cast<T>(loss))) {
      stop(member, model, first, last, epoch, step);
      own.running[model] = 0;
      if (member.begin == 0) {
        losses_[epoch * run_.models + model] = shown(loss);
      }
      return;
    }
    own.mean[model] += loss * (static_cast<double>(rows) / static_cast<double>(run_.rows));
    const auto [begin, end] = share(member, model, first, last);
    if (begin == end) {
      return;
    }
    const Place at = place(model);
    const int64_t stride = run_.models * sums_, weights = models_.weights();
    const auto add_up = [&](int64_t offset, int64_t from, int64_t to, T* gradient) {
      if (to > from) { // the kernel writes at its own index
        kernels_.add_up(partial_.data() + offset, blocks, stride, from, to, 1.0, gradient);
      }
    };
    T* const gradient = own.gradient.data();
    if (run_.train_weight) {
      add_up(at.weight, std::min(begin, weights), std::min(end, weights), gradient);
    }
    if (run_.train_bias) {
      add_up(at.bias, std::max(begin, weights) - weights, std::max(end, weights) - weights, gradient + weights);
    }
    models_.update(model, models_.update_of(model, epoch, step), begin, end, gradient + begin);
  }

  void stop(const Member& member, int64_t model, int64_t first, int64_t last, int64_t epoch, int64_t step) {
    const auto [begin, end] = share(member, model, first, last);
    models_.restore(model, step, begin, end);
    if (member.begin == 0) {
      models_.stop(model, epoch);
    }
  }

  const RowsRun& run_;
  Models<T> models_;
  cpu::Kernels kernels_;
  Rows<T> train_;
  std::optional<Rows<T>> validation_;
  int64_t d_, o_;
  int64_t group_, groups_; // models that the kernel is given at a time, and how many times
  int64_t sums_; // of a model: loss, bias gradient, weight gradient
  int64_t piece_rows_;
  int64_t blocks_ = 1; // of a whole batch
  int64_t most_blocks_ = 1;
  int64_t threads_;
  bool by_groups_ = false; // threads have models of their own, not rows
  int64_t scratch_bytes_ = 0;
  std::vector<double> partial_; // [block][model][sum]
  std::vector<Own> members_;
  at::Tensor order_;
  double* losses_ = nullptr;
  double* validation_losses_ = nullptr;
};

Losses linear_mse_fit_cpu(const RowsRun& run) {
  if (run.out_features > cpu::kMaximumFewOutputs) {
    return decomposed_rows_run(run);
  }
  count_changes(run);
  return run.input.scalar_type() == at::kDouble ? Loop<double>(run).run() : Loop<float>(run).run();
}

TORCH_LIBRARY_IMPL(torchintro, CPU, m) {
  m.impl("linear_mse_fit", rows_operator<linear_mse_fit_cpu>);
}

} // namespace
} // namespace torchintro::fit
