/* A pool of threads that meet often: a step of a small model has about 150 meetings a millisecond.
 *
 * A waiting thread spins for some microseconds, then offers its core to others between two looks, for up to 2 ms at a
 * meeting and half a millisecond between steps, then sleeps on a futex. Sleeping sooner would let a virtual machine's
 * core go idle at every delay, and a host that has other guests is slow to bring it back.
 *
 * Threads that meet are as slow as the one that another process keeps from running. So the pool counts how often its
 * threads are put off their cores against their will; where that is often, it goes on with one thread fewer, and tries
 * the next one again after a while, ever more rarely. After fork the child has no workers; they start at its next step.
 */
#define _GNU_SOURCE
#include "core.h"
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { SPIN_NS = 30000, AWAKE_MEETING_NS = 2000000, AWAKE_IDLE_NS = 500000 };
enum { WATCH_NS = 40000000, OFTEN = 300, FIRST_PAUSE_NS = 250000000, LAST_PAUSE_NS = 2000000000 };  /* OFTEN: a second and thread */

typedef struct { _Alignas(64) atomic_uint value; atomic_int sleepers; } gate;

struct pool {
    gate meeting, job;                               /* job: a count of runs << 8, and how many threads carry this one */
    _Alignas(64) atomic_int arrived;
    atomic_int put_off;
    int threads, active, quit;
    int64_t since, retry, pause;
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
static void wait_change(gate *g, unsigned old, int64_t awake_ns) {
    int64_t since = 0;
    while (1) {
        for (int i = 0; i < 64; i++) {
            if (atomic_load_explicit(&g->value, memory_order_acquire) != old) return;
            breathe();
        }
        int64_t now = now_ns();
        if (!since) since = now;
        if (now - since >= awake_ns) break;
        if (now - since >= SPIN_NS) sched_yield();
    }
    atomic_fetch_add(&g->sleepers, 1);
    while (atomic_load(&g->value) == old) syscall(SYS_futex, &g->value, FUTEX_WAIT_PRIVATE, old, NULL, NULL, 0);
    atomic_fetch_sub(&g->sleepers, 1);
}

static void advance(gate *g, unsigned to) {
    atomic_store(&g->value, to);
    if (atomic_load(&g->sleepers)) syscall(SYS_futex, &g->value, FUTEX_WAKE_PRIVATE, MAX_THREADS, NULL, NULL, 0);
}

void pool_barrier(pool *p, int thread) {
    (void)thread;
    if (p->active == 1) return;
    unsigned old = atomic_load_explicit(&p->meeting.value, memory_order_acquire);
    if (atomic_fetch_add(&p->arrived, 1) == p->active - 1) {
        atomic_store(&p->arrived, 0);
        advance(&p->meeting, old + 1);
    } else wait_change(&p->meeting, old, AWAKE_MEETING_NS);
}

/* One thread's part of a run, and how often it was put off meanwhile. */
static void take_part(pool *p, int id) {
    struct rusage before, after;
    getrusage(RUSAGE_THREAD, &before);
    p->work(p->context, id);
    getrusage(RUSAGE_THREAD, &after);
    atomic_fetch_add(&p->put_off, (int)(after.ru_nivcsw - before.ru_nivcsw));
    pool_barrier(p, id);
}

static void *worker(void *argument) {
    struct seat *s = argument;
    pool *p = s->pool;
    for (unsigned job = 0;;) {
        wait_change(&p->job, job, AWAKE_IDLE_NS);
        job = atomic_load(&p->job.value);
        if (p->quit) return NULL;
        if ((unsigned)s->id < (job & 255)) take_part(p, s->id);
    }
}

/* How many threads carry the next run. */
static void adapt(pool *p) {
    int64_t now = now_ns(), watched = now - p->since;
    if (watched < WATCH_NS) return;
    int often = (int64_t)atomic_exchange(&p->put_off, 0) * 1000000000 > OFTEN * p->active * watched;
    p->since = now;
    if (often && p->active > 1) {
        p->active--;
        p->pause = p->pause ? 2 * p->pause < LAST_PAUSE_NS ? 2 * p->pause : LAST_PAUSE_NS : FIRST_PAUSE_NS;
        p->retry = now + p->pause;
    } else if (p->active < p->threads && now > p->retry) p->active++, p->retry = now + FIRST_PAUSE_NS;
    else if (p->active == p->threads && now > p->retry) p->pause = 0;
}

static void start(pool *p) {
    memset(&p->meeting, 0, sizeof p->meeting);
    memset(&p->job, 0, sizeof p->job);
    atomic_store(&p->arrived, 0);
    p->owner = getpid(), p->active = p->threads;
    for (int i = 1; i < p->threads; i++) {
        p->seat[i] = (struct seat){p, i};
        if (pthread_create(&p->thread[i], NULL, worker, &p->seat[i])) { p->threads = p->active = i; break; }   /* fewer is still right */
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
        advance(&p->job, p->job.value + 256);
        for (int i = 1; i < p->threads; i++) pthread_join(p->thread[i], NULL);
    }
    free(p);
}

void pool_run(pool *p, void (*work)(void *, int), void *context) {
    if (p->owner != getpid()) start(p);
    p->work = work, p->context = context;
    if (p->active == 1) work(context, 0);
    else {
        advance(&p->job, (p->job.value & ~255u) + 256 + p->active);
        take_part(p, 0);
    }
    if (p->threads > 1) adapt(p);
}

int pool_threads(const pool *p) { return p->active; }
