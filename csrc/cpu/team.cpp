#include "team.h"

#include <dlfcn.h>
#include <immintrin.h>

#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace lowrank::cpu {

namespace {

using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
using Number = int (*)();

// GNU's entry, which LLVM's and Intel's libraries have, too.
struct OpenMp {
    Parallel parallel = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    Number size = reinterpret_cast<Number>(dlsym(RTLD_DEFAULT, "omp_get_num_threads"));
    Number inside = reinterpret_cast<Number>(dlsym(RTLD_DEFAULT, "omp_in_parallel"));
    bool usable() const { return parallel != nullptr && size != nullptr && inside != nullptr && !inside(); }
};

struct Job {
    std::function<void(int)> const* work;
    OpenMp const* omp;
    int count;
    std::atomic<int> next{0};
    std::atomic<bool> whole{true};
    std::mutex mutex{};
    std::exception_ptr failure{};

    void run(int thread) {
        try {
            (*work)(thread);
        } catch (...) {
            std::lock_guard<std::mutex> const lock(mutex);
            failure = std::current_exception();
        }
    }
};

void enter(void* data) {
    Job& job = *static_cast<Job*>(data);
    // A library may start fewer threads than it was asked for; a team that is not whole would wait for ever.
    if (job.omp->size() != job.count)
        job.whole = false;
    else
        job.run(job.next++);
}

}  // namespace

void run_team(int count, std::function<void(int)> const& work) {
    if (count <= 1) return work(0);
    static OpenMp const omp;
    Job job{&work, &omp, count};
    if (omp.usable()) omp.parallel(enter, &job, unsigned(count), 0);
    if (!omp.usable() || !job.whole) {
        std::vector<std::thread> others;
        for (int i = 1; i < count; ++i) others.emplace_back([&job, i] { job.run(i); });
        job.run(0);
        for (auto& other : others) other.join();
    }
    if (job.failure) std::rethrow_exception(job.failure);
}

void Barrier::wait() {
    unsigned const phase = phase_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == count_) {
        arrived_.store(0, std::memory_order_relaxed);
        phase_.store(phase + 1, std::memory_order_release);
        return;
    }
    for (int spins = 0; phase_.load(std::memory_order_acquire) == phase; ++spins) {
        if (spins < 2000)
            _mm_pause();
        else
            std::this_thread::yield();
    }
}

}  // namespace lowrank::cpu
