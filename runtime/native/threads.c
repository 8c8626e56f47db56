/* A pool of threads that meet often: a step of a small model has about 150 meetings a millisecond.
 *
 * A waiting thread spins for some microseconds, then offers its core to others between two looks, for up to 2 ms at a
 * meeting and half a millisecond between steps, then sleeps. Sleeping sooner would let a virtual machine's
 * core go idle at every delay, and a host that has other guests is slow to bring it back.
 *
 * Threads that meet are as slow as the one that another process keeps from running: two threads beside one busy process
 * on two CPUs are slower than one. So the pool adds up the time its threads spend off their cores during runs (they
 * wait awake, so on an idle machine that is next to nothing); where it is much, the next run has one thread fewer, and
 * the pool tries the next one again after a while, ever more rarely.
 *
 * Why a meeting can neither be missed nor wait for ever: how many threads carry a run is decided before it begins and
 * told with its number, in one word, so all of them count alike. A meeting ends only when all have arrived, and a
 * thread reads `meeting` before it arrives, so what it waits to see change is this meeting's number. A run ends with a
 * meeting, so none of its threads is still in it when the next begins. Who sleeps counts itself among `sleepers` before
 * its last look at the number, and who changes the number looks at `sleepers` after: one of the two sees the other.
 *
 * Runs take turns. After fork the child has no workers, and `turn` may be held by a thread that it does not have: the
 * process counts its forks, and whoever enters a pool of an earlier count makes both anew.
 */
#define _GNU_SOURCE
#include "core.h"
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <time.h>

enum { SPIN_NS = 30000, AWAKE_MEETING_NS = 2000000, AWAKE_IDLE_NS = 500000 };
enum { WATCH_NS = 40000000, FIRST_PAUSE_NS = 250000000, LAST_PAUSE_NS = 2000000000 };
enum { MUCH = 15 };                                  /* percent of a run */
enum { STACK = 8 << 20 };                            /* bytes: amx.h takes up to 2.5 MB, musl would give 128 kB */

/* A number to watch; who has watched it in vain for long sleeps. */
typedef struct {
    _Alignas(64) atomic_uint value;
    atomic_int sleepers;
    pthread_mutex_t lock;
    pthread_cond_t changed;
} gate;

struct pool {
    gate meeting, job;                               /* job: a count of runs << 8, and the threads of this one */
    _Alignas(64) atomic_int arrived;                 /* at the meeting */
    atomic_llong off_core;                           /* nanoseconds of all threads, since the last look */
    atomic_int forks;                                /* of the process when the workers were started */
    atomic_int quit;
    int threads, active, renewed;                    /* active: of the next run; renewed: after a fork */
    int64_t since, retry, pause;                     /* ns: the last look, the next try of one more, between tries */
    pthread_mutex_t turn;                            /* held by the caller who has entered */
    void (*work)(void *, int, int);                  /* of the present run, with its context */
    void *context;
    pthread_t thread[MAX_THREADS];                   /* [threads], without the caller's at 0 */
    struct seat { pool *pool; int id; } seat[MAX_THREADS];       /* a worker's argument */
};

static atomic_int forks;
static pthread_mutex_t renewal = PTHREAD_MUTEX_INITIALIZER;
static pthread_once_t watched = PTHREAD_ONCE_INIT;

static void in_child(void) {
    pthread_mutex_init(&renewal, NULL);
    atomic_fetch_add(&forks, 1);
}

static void watch(void) { pthread_atfork(NULL, NULL, in_child); }

static inline void breathe(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static int64_t ns_of(clockid_t clock) {
    struct timespec t;
    clock_gettime(clock, &t);
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
        int64_t now = ns_of(CLOCK_MONOTONIC);
        if (!since) since = now;
        if (now - since >= awake_ns) break;
        if (now - since >= SPIN_NS) sched_yield();
    }
    pthread_mutex_lock(&g->lock);
    atomic_fetch_add(&g->sleepers, 1);
    while (atomic_load(&g->value) == old) pthread_cond_wait(&g->changed, &g->lock);
    atomic_fetch_sub(&g->sleepers, 1);
    pthread_mutex_unlock(&g->lock);
}

/* Gives g its next value and wakes who sleeps there. */
static void advance(gate *g, unsigned to) {
    atomic_store(&g->value, to);
    if (!atomic_load(&g->sleepers)) return;
    pthread_mutex_lock(&g->lock);                    /* so that a sleeper is not between its last look and its sleep */
    pthread_mutex_unlock(&g->lock);
    pthread_cond_broadcast(&g->changed);
}

void pool_barrier(pool *p, int threads) {
    if (threads == 1) return;
    unsigned old = atomic_load_explicit(&p->meeting.value, memory_order_acquire);
    if (atomic_fetch_add(&p->arrived, 1) == threads - 1) {
        atomic_store(&p->arrived, 0);
        advance(&p->meeting, old + 1);
    } else wait_change(&p->meeting, old, AWAKE_MEETING_NS);
}

/* One thread's part of a run, and the meeting at its end. */
static void take_part(pool *p, int id, int threads) {
    int64_t wall = ns_of(CLOCK_MONOTONIC), cpu = ns_of(CLOCK_THREAD_CPUTIME_ID);
    p->work(p->context, id, threads);
    atomic_fetch_add(&p->off_core, ns_of(CLOCK_MONOTONIC) - wall - (ns_of(CLOCK_THREAD_CPUTIME_ID) - cpu));
    pool_barrier(p, threads);
}

static void *worker(void *argument) {
    struct seat *s = argument;
    pool *p = s->pool;
    for (unsigned job = 0;;) {
        wait_change(&p->job, job, AWAKE_IDLE_NS);
        job = atomic_load(&p->job.value);
        if (p->quit) return NULL;
        if (s->id < (int)(job & 255)) take_part(p, s->id, job & 255);
    }
}

/* How many threads carry the next run. */
static void adapt(pool *p) {
    int64_t now = ns_of(CLOCK_MONOTONIC), watched = now - p->since;
    if (watched < WATCH_NS) return;
    int much = atomic_exchange(&p->off_core, 0) * 100 > MUCH * p->active * watched;
    p->since = now;
    if (much && p->active > 1) {
        p->active--;
        p->pause = p->pause ? 2 * p->pause < LAST_PAUSE_NS ? 2 * p->pause : LAST_PAUSE_NS : FIRST_PAUSE_NS;
        p->retry = now + p->pause;
    } else if (p->active < p->threads && now > p->retry) p->active++, p->retry = now + FIRST_PAUSE_NS;
    else if (p->active == p->threads && now > p->retry) p->pause = 0;
}

static void gate_init(gate *g) {
    memset(g, 0, sizeof *g);
    pthread_mutex_init(&g->lock, NULL);
    pthread_cond_init(&g->changed, NULL);
}

/* A pool's state and workers, new or anew in a child. */
static void start(pool *p) {
    pthread_attr_t large;
    gate_init(&p->meeting);
    gate_init(&p->job);
    atomic_store(&p->arrived, 0);
    pthread_mutex_init(&p->turn, NULL);
    pthread_attr_init(&large);
    pthread_attr_setstacksize(&large, STACK);
    for (int i = 1; i < p->threads; i++) {
        p->seat[i] = (struct seat){p, i};
        if (pthread_create(&p->thread[i], &large, worker, &p->seat[i])) p->threads = i;      /* fewer is right */
    }
    pthread_attr_destroy(&large);
    p->active = p->threads, p->renewed = 1;
    atomic_store(&p->forks, atomic_load(&forks));
}

pool *pool_new(int threads) {
    pthread_once(&watched, watch);
    pool *p = aligned_alloc(64, align64(sizeof *p));
    if (!p) return NULL;
    memset(p, 0, sizeof *p);
    p->threads = threads;
    start(p);
    return p;
}

void pool_free(pool *p) {
    if (!p) return;
    if (atomic_load(&p->forks) == atomic_load(&forks)) {
        p->quit = 1;
        advance(&p->job, atomic_load(&p->job.value) + 256);
        for (int i = 1; i < p->threads; i++) pthread_join(p->thread[i], NULL);
    }
    free(p);
}

int pool_enter(pool *p) {
    if (atomic_load(&p->forks) != atomic_load(&forks)) {
        pthread_mutex_lock(&renewal);                /* threads of a child may come at once */
        if (atomic_load(&p->forks) != atomic_load(&forks)) start(p);
        pthread_mutex_unlock(&renewal);
    }
    pthread_mutex_lock(&p->turn);
    int renewed = p->renewed;
    p->renewed = 0;
    return renewed;
}

void pool_leave(pool *p) { pthread_mutex_unlock(&p->turn); }

void pool_run(pool *p, void (*work)(void *, int, int), void *context) {
    p->work = work, p->context = context;
    if (p->active == 1) work(context, 0, 1);
    else {
        advance(&p->job, (atomic_load(&p->job.value) & ~255u) + 256 + p->active);
        take_part(p, 0, p->active);
    }
    if (p->threads > 1) adapt(p);
}
