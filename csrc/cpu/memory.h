// Memory aligned to cache lines, which grows and is used again.
#pragma once
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

namespace lowrank::cpu {

template <class T>
class Buffer {
public:
    Buffer() = default;
    explicit Buffer(size_t count) { zeros(count); }
    Buffer(Buffer&& other) noexcept : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}
    Buffer& operator=(Buffer&& other) noexcept {
        std::swap(data_, other.data_), std::swap(size_, other.size_);
        return *this;
    }
    ~Buffer() { std::free(data_); }

    // At least `count` elements. New memory is zero: what no kernel writes is read as padding, times zero.
    T* take(size_t count) {
        if (count > size_) zeros(count);
        return data_;
    }
    T* data() const { return data_; }

private:
    void zeros(size_t count) {
        std::free(data_);
        data_ = nullptr, size_ = 0;
        size_t const bytes = (count * sizeof(T) + 63) / 64 * 64;
        if (bytes == 0) return;
        data_ = static_cast<T*>(std::aligned_alloc(64, bytes));
        if (data_ == nullptr) throw std::bad_alloc();
        std::memset(static_cast<void*>(data_), 0, bytes);
        size_ = count;
    }
    T* data_ = nullptr;
    size_t size_ = 0;
};

}  // namespace lowrank::cpu
