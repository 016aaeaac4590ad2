// Room for what lies between products.
#pragma once

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
// count them as the process's).
class KeptMemory {
  struct Block {
    void* p;
    size_t size;
  };
  static constexpr size_t PAGE = 2 << 20, MOST_BLOCKS = 16;
  std::vector<Block> free_;  // the last to be given back at the end
  std::mutex mutex_;

 public:
  static constexpr size_t LEAST = 1 << 20;  // the C library keeps what is smaller

  void* take(size_t* size) {
    *size = (*size + PAGE - 1) / PAGE * PAGE;
    const std::lock_guard<std::mutex> lock(mutex_);
    for (size_t i = free_.size(); i-- > 0;)
      if (free_[i].size >= *size && free_[i].size <= 2 * *size) {
        const Block found = free_[i];
        free_.erase(free_.begin() + i);
        *size = found.size;
        return found.p;
      }
    void* p = map(*size);
    if (!p) {
      while (!free_.empty()) drop_oldest();
      p = map(*size);
    }
    if (!p) throw std::bad_alloc();
    return p;
  }

  void give_back(void* p, size_t size) {
    madvise(p, size, MADV_FREE);
    const std::lock_guard<std::mutex> lock(mutex_);
    free_.push_back({p, size});
    if (free_.size() > MOST_BLOCKS) drop_oldest();
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
