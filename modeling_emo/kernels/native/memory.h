// Room for what lies between products.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace {

#if defined(__linux__) && defined(MADV_FREE)
// Fresh memory comes page by page, each cleared first, which takes a fifth of a large call. Large blocks stay
// from call to call, marked as free: the system takes them whenever anyone needs memory (until then tools
// count them as the process's). No more is kept than was in use at once.
class KeptMemory {
  struct Block {
    void* p;
    size_t size;
  };
  static constexpr size_t PAGE = 2 << 20;
  std::vector<Block> free_;  // the last to be given back at the end
  size_t kept_ = 0, used_ = 0, most_used_ = 0;
  std::mutex mutex_;

 public:
  static constexpr size_t LEAST = 1 << 20;  // the C library keeps what is smaller

  void* take(size_t* size) {
    *size = (*size + PAGE - 1) / PAGE * PAGE;
    const std::lock_guard<std::mutex> lock(mutex_);
    void* p = nullptr;
    for (size_t i = free_.size(); i-- > 0 && !p;)
      if (free_[i].size >= *size && free_[i].size <= 2 * *size) {
        p = free_[i].p, *size = free_[i].size;
        kept_ -= *size;
        free_.erase(free_.begin() + i);
      }
    if (!p) p = map(*size);
    if (!p) {
      while (!free_.empty()) drop_oldest();
      p = map(*size);
    }
    if (!p) throw std::bad_alloc();
    used_ += *size;
    most_used_ = std::max(most_used_, used_);
    return p;
  }

  void give_back(void* p, size_t size) noexcept {
    madvise(p, size, MADV_FREE);
    const std::lock_guard<std::mutex> lock(mutex_);
    used_ -= size;
    try {
      free_.push_back({p, size});
      kept_ += size;
    } catch (const std::bad_alloc&) {
      munmap(p, size);
    }
    while (kept_ > most_used_) drop_oldest();
  }

 private:
  static void* map(size_t size) {
    void* p = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) return nullptr;
    madvise(p, size, MADV_HUGEPAGE);
    return p;
  }
  void drop_oldest() {
    munmap(free_.front().p, free_.front().size);
    kept_ -= free_.front().size;
    free_.erase(free_.begin());
  }
};

KeptMemory& kept_memory() {
  static KeptMemory& memory = *new KeptMemory;  // for as long as there are threads
  return memory;
}
#endif

// Uninitialised numbers, on a cache line of their own.
template <class T>
struct Buffer {
  T* p;

  explicit Buffer(size_t count) : size_(count * sizeof(T) + 64) {
#if defined(__linux__) && defined(MADV_FREE)
    if (size_ >= KeptMemory::LEAST) {
      p = (T*)kept_memory().take(&size_);
      return;
    }
#endif
    void* found = nullptr;
    if (posix_memalign(&found, 64, size_)) throw std::bad_alloc();
    p = (T*)found;
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() {
#if defined(__linux__) && defined(MADV_FREE)
    if (size_ >= KeptMemory::LEAST) {
      kept_memory().give_back(p, size_);
      return;
    }
#endif
    free(p);
  }

 private:
  size_t size_;
};

}  // namespace
