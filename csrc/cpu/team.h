// A few threads that do one thing together.
#pragma once
#include <atomic>
#include <functional>

namespace lowrank::cpu {

// Calls work(thread) for threads 0 to count - 1 at the same time. The threads are those of the process's OpenMP library if it
// has one, so torch's: a second pool would fight with its waiting threads for the cores.
void run_team(int count, std::function<void(int)> const& work);

// All threads of a team wait here for each other, any number of times.
class Barrier {
public:
    explicit Barrier(int count) : count_(count) {}
    void wait();

private:
    int const count_;
    std::atomic<int> arrived_{0};
    std::atomic<unsigned> phase_{0};
};

}  // namespace lowrank::cpu
