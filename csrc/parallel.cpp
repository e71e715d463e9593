// A pool of threads of our own: the OpenMP runtime that a wheel would find at load time need not be torch's, and a
// second one would fight with it.
#include "parallel.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace dac {
namespace {

// Waiting for a short while without sleeping: to be woken takes as long as a small layer of a stream.
template <class Condition>
void spin_until(const Condition& condition) {
  static const bool alone = std::thread::hardware_concurrency() < 2;
  const auto end = std::chrono::steady_clock::now() + std::chrono::microseconds(alone ? 0 : 50);
  while (!condition() && std::chrono::steady_clock::now() < end) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#endif
  }
}

class Pool {
 public:
  const pid_t process = getpid();

  // False, with nothing done, when another caller has the pool.
  bool run(int64_t count, int64_t grain, int threads, const std::function<void(int64_t, int64_t)>& body) {
    std::unique_lock<std::mutex> owner(owner_, std::try_to_lock);
    if (!owner) return false;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      while (static_cast<int>(workers_) < threads - 1) {
        std::thread([this, index = workers_] { serve(index); }).detach();
        ++workers_;
      }
      body_ = &body, count_ = count, grain_ = grain;
      next_ = 0, error_ = nullptr;
      wanted_ = threads - 1, open_ = true;
      ++job_;
    }
    wake_.notify_all();
    work();
    std::unique_lock<std::mutex> lock(mutex_);
    // On a busy machine a worker may get no processor for long: one that has not begun is not waited for.
    open_ = false;
    if (joined_ != 0) {
      lock.unlock();
      spin_until([this] { return joined_ == 0; });
      lock.lock();
      done_.wait(lock, [this] { return joined_ == 0; });
    }
    if (error_) std::rethrow_exception(error_);
    return true;
  }

 private:
  void serve(int index) {
    uint64_t seen = 0;
    while (true) {
      spin_until([&] { return job_ != seen; });
      std::unique_lock<std::mutex> lock(mutex_);
      wake_.wait(lock, [&] { return job_ != seen; });
      seen = job_;
      if (!open_ || index >= wanted_) continue;
      ++joined_;
      lock.unlock();
      work();
      lock.lock();
      if (--joined_ == 0) done_.notify_one();
    }
  }

  void work() {
    try {
      for (int64_t begin; (begin = next_.fetch_add(grain_)) < count_;) {
        (*body_)(begin, std::min(begin + grain_, count_));
      }
    } catch (...) {
      std::lock_guard<std::mutex> lock(mutex_);
      error_ = std::current_exception();
    }
  }

  std::mutex owner_, mutex_;
  std::condition_variable wake_, done_;
  const std::function<void(int64_t, int64_t)>* body_ = nullptr;
  int64_t count_ = 0, grain_ = 1;
  std::atomic<int64_t> next_{0};
  std::exception_ptr error_;
  std::atomic<uint64_t> job_{0};
  std::atomic<int> joined_{0};
  int workers_ = 0, wanted_ = 0;
  bool open_ = false;
};

// The pool is never destroyed, because its threads may outlive every static. A forked child has none of its parent's
// threads, so it makes a pool of its own; and it may have been forked while another thread was in here, so nothing here
// locks.
Pool& pool() {
  static std::atomic<Pool*> current{nullptr};
  Pool* known = current.load();
  while (!known || known->process != getpid()) {
    auto made = std::make_unique<Pool>();
    if (current.compare_exchange_strong(known, made.get())) return *made.release();
  }
  return *known;
}

}  // namespace

void parallel_for(int64_t count, int64_t grain, int threads, const std::function<void(int64_t, int64_t)>& body) {
  if (count <= 0) return;
  const int64_t pieces = (count + grain - 1) / grain;
  threads = static_cast<int>(std::min<int64_t>(threads, pieces));
  if (threads > 1 && pool().run(count, grain, threads, body)) return;
  for (int64_t begin = 0; begin < count; begin += grain) body(begin, std::min(begin + grain, count));
}

}  // namespace dac
