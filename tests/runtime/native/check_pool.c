/* The pool under ThreadSanitizer: callers that take turns, runs of changing numbers of threads, meetings in each, and
 * forks. In every meeting all threads of the run must have come as often, and none of another run. `make test-tsan`. */
#include "../../../runtime/native/threads.c"
#include <stdio.h>
#include <sys/wait.h>
#include <unistd.h>

enum { THREADS = 4, MEETINGS = 25 };
static int came[THREADS], runs;
static atomic_int wrong;
static pool *shared;

static void work(void *context, int id, int threads) {
    for (int meeting = 1; meeting <= MEETINGS; meeting++) {
        came[id]++;
        pool_barrier(context, threads);
        for (int i = 0; i < threads; i++) if (came[i] != meeting) atomic_fetch_add(&wrong, 1);
        pool_barrier(context, threads);
    }
}

static void turns(int count, unsigned seed) {
    for (int n = 0; n < count; n++) {
        pool_enter(shared);
        memset(came, 0, sizeof came);
        shared->active = 1 + rand_r(&seed) % shared->threads;                /* as adapt() may have it, and faster */
        pool_run(shared, work, shared);
        runs++;
        pool_leave(shared);
        if (n % 64 == 0) usleep(rand_r(&seed) % 1500);                       /* workers fall asleep */
    }
}

static void *caller(void *argument) {
    turns(*(int *)argument, (unsigned)(size_t)argument);
    return NULL;
}

int main(int arguments, char **argument) {
    int count = arguments > 1 ? atoi(argument[1]) : 1000, forks = arguments > 2 ? atoi(argument[2]) : 0, hung = 0;
    pthread_t thread[3];
    shared = pool_new(THREADS);
    for (int i = 0; i < 3; i++) pthread_create(&thread[i], NULL, caller, &count);
    for (int i = 0; i < forks; i++) {
        usleep(1000);
        pid_t child = fork();
        if (!child) {
            alarm(20);
            turns(20, i);
            pool_free(shared);
            _exit(wrong != 0);
        }
        int status;
        waitpid(child, &status, 0);
        hung += WIFSIGNALED(status), wrong += !WIFSIGNALED(status) && status;
    }
    for (int i = 0; i < 3; i++) pthread_join(thread[i], NULL);
    pool_free(shared);
    printf("%d runs of 1 to %d threads, %d meetings each; %d forks, %d hung; %d wrong\n", runs, THREADS, 2 * MEETINGS,
           forks, hung, wrong);
    return wrong || hung || runs != 3 * count;
}
