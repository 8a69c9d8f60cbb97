// Recording: the op calls of one forward, kept with their Params, so that another forward of its shape is one call without Python or torch.
#pragma once
#include <cstdint>
#include <functional>
#include <utility>
#include <vector>

namespace glmx {

// While a thread records, what it calls through `run` is kept: the op's host function, so its checks and its choice of a kernel too, and
// a copy of its Params. `replay` makes the same calls in the same order. The contents behind the pointers may have changed by then; the
// memory must still be there, which is the recorder's to see to (python/glmx/models/recorder.py): what may move without it, it asks about.
class Recording {
 public:
  // This thread records from `begin` to `end`.
  void begin();
  static void end();
  static Recording* active();  // this thread's, or null

  void add(std::function<void()> call) { calls_.push_back(std::move(call)); }
  void ask_first(std::function<bool()> holds) { holds_ = std::move(holds); }
  int64_t size() const { return static_cast<int64_t>(calls_.size()); }
  // False, and nothing is done, where the recording no longer holds.
  bool replay() const {
    if (holds_ && !holds_()) return false;
    for (const auto& call : calls_) call();
    return true;
  }

 private:
  std::vector<std::function<void()>> calls_;
  std::function<bool()> holds_;
};

template <class Params>
void run(void (*op)(const Params&), const Params& p) {
  op(p);
  if (Recording* recording = Recording::active()) recording->add([op, p] { op(p); });
}

}  // namespace glmx
