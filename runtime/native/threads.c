/* A pool of threads that meet often: a step of a small model has about 150 meetings a millisecond.
 *
 * A waiting thread spins, for a few microseconds at a meeting and up to half a millisecond between steps, then sleeps on
 * a futex. Sleeping, not only yielding, is what keeps a busy machine fair: the core that a sleeper gives up takes over
 * the thread everybody is waiting for. After fork the child has no workers; they start again at its next step.
 */
#define _GNU_SOURCE
#include "core.h"
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { SPIN_MEETING_NS = 30000, SPIN_IDLE_NS = 500000 };

typedef struct { _Alignas(64) atomic_int value; atomic_int sleepers; } gate;

struct pool {
    gate meeting, job;
    _Alignas(64) atomic_int arrived;
    int threads, quit;
    pid_t owner;
    void (*work)(void *, int);
    void *context;
    pthread_t thread[MAX_THREADS];
    struct seat { pool *pool; int id; } seat[MAX_THREADS];
};

static inline void breathe(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

/* Returns when g no longer has the value `old`. */
static void wait_change(gate *g, int old, int64_t spin_ns) {
    int64_t until = 0;
    while (1) {
        for (int i = 0; i < 64; i++) {
            if (atomic_load_explicit(&g->value, memory_order_acquire) != old) return;
            breathe();
        }
        int64_t now = now_ns();
        if (!until) until = now + spin_ns;
        if (now >= until) break;
    }
    atomic_fetch_add(&g->sleepers, 1);
    while (atomic_load(&g->value) == old) syscall(SYS_futex, &g->value, FUTEX_WAIT_PRIVATE, old, NULL, NULL, 0);
    atomic_fetch_sub(&g->sleepers, 1);
}

static void advance(gate *g) {
    atomic_fetch_add(&g->value, 1);
    if (atomic_load(&g->sleepers)) syscall(SYS_futex, &g->value, FUTEX_WAKE_PRIVATE, MAX_THREADS, NULL, NULL, 0);
}

void pool_barrier(pool *p, int thread) {
    (void)thread;
    if (p->threads == 1) return;
    int old = atomic_load_explicit(&p->meeting.value, memory_order_acquire);
    if (atomic_fetch_add(&p->arrived, 1) == p->threads - 1) {
        atomic_store(&p->arrived, 0);
        advance(&p->meeting);
    } else wait_change(&p->meeting, old, SPIN_MEETING_NS);
}

static void *worker(void *argument) {
    struct seat *s = argument;
    pool *p = s->pool;
    for (int old = 0;; old++) {
        wait_change(&p->job, old, SPIN_IDLE_NS);
        if (p->quit) return NULL;
        p->work(p->context, s->id);
        pool_barrier(p, s->id);
    }
}

static void start(pool *p) {
    memset(&p->meeting, 0, sizeof p->meeting);
    memset(&p->job, 0, sizeof p->job);
    atomic_store(&p->arrived, 0);
    p->owner = getpid();
    for (int i = 1; i < p->threads; i++) {
        p->seat[i] = (struct seat){p, i};
        if (pthread_create(&p->thread[i], NULL, worker, &p->seat[i])) { p->threads = i; break; }   /* fewer is still right */
    }
}

pool *pool_new(int threads) {
    pool *p = aligned_alloc(64, align64(sizeof *p));
    if (!p) return NULL;
    memset(p, 0, sizeof *p);
    p->threads = threads;
    start(p);
    return p;
}

void pool_free(pool *p) {
    if (!p) return;
    if (p->owner == getpid()) {
        p->quit = 1;
        advance(&p->job);
        for (int i = 1; i < p->threads; i++) pthread_join(p->thread[i], NULL);
    }
    free(p);
}

void pool_run(pool *p, void (*work)(void *, int), void *context) {
    if (p->owner != getpid()) start(p);
    p->work = work, p->context = context;
    if (p->threads > 1) advance(&p->job);
    work(context, 0);
    pool_barrier(p, 0);
}

int pool_threads(const pool *p) { return p->threads; }
