// Threads of a team on CPUs of their own.
//
// A worker that slept may wake on the CPU of the thread that woke it, and Linux leaves both there for up to a second:
// every kernel then takes twice as long.
#pragma once
#include <chrono>
#ifdef __linux__
#include <sched.h>
#endif

struct Placement {
#ifdef __linux__
    bool taken[CPU_SETSIZE] = {};

    bool take(int cpu) { return cpu < 0 || cpu >= CPU_SETSIZE || !__atomic_exchange_n(&taken[cpu], true, __ATOMIC_RELAXED); }

    // Called by each thread of the team: keeps the CPU that it is on, or moves to one that nobody has. The CPUs that it may
    // use are the same afterwards.
    void settle() {
        cpu_set_t allowed, free;
        if (take(sched_getcpu()) || sched_getaffinity(0, sizeof allowed, &allowed)) return;
        CPU_ZERO(&free);
        for (int cpu = 0; cpu < CPU_SETSIZE; cpu++)
            if (CPU_ISSET(cpu, &allowed) && !__atomic_load_n(&taken[cpu], __ATOMIC_RELAXED)) CPU_SET(cpu, &free);
        if (!CPU_COUNT(&free) || sched_setaffinity(0, sizeof free, &free)) return;
        take(sched_getcpu());
        sched_setaffinity(0, sizeof allowed, &allowed);
    }
#else
    void settle() {}
#endif
};

inline double seconds() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}
