/* A team of threads: the caller and num_threads - 1 helpers that sleep between ops.

   Units are claimed one by one from a counter, so that a member whose core is taken away delays the op by one unit at
   most, and a team whose helpers never get a core still goes at the speed of its caller. (OpenMP splits evenly and
   spins at the barrier: with shared cores it goes several times slower than one thread.) A helper looks out for the next
   op for some microseconds before it sleeps, because ops follow each other closely within a step.

   Which member does a unit never shows in the result: units write disjoint outputs and no sum crosses a unit. */

#include "threads.h"
#include "vector.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>

#define LOOKOUTS 2000 /* about 30 µs: longer than Python takes between two ops, much shorter than a time slice */

typedef struct {
    void *memory;
    size_t bytes;
} scratch;

typedef struct {
    team *team;
    pthread_t thread;
    scratch scratch;
    int number;
} member;

struct team {
    pthread_mutex_t lock; /* guards every field of the job, and `active` and `stopping` when written */
    pthread_cond_t posted, finished;
    atomic_long job_number; /* grows with each job; helpers compare it with the last one they saw */
    unit_function *function;
    void *job;
    int64_t num_units;
    atomic_llong next_unit;
    atomic_int active; /* helpers inside the current job; it may only be replaced at 0 */
    bool stopping;
    scratch shared, step;
    int size;
    member members[];
};

static void pause_a_little(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static void claim_units(team *team, unit_function *function, void *job, int64_t num_units, int number)
{
    for (int64_t unit; (unit = atomic_fetch_add(&team->next_unit, 1)) < num_units;)
        function(job, unit, number);
}

static void *help(void *argument)
{
    member *self = argument;
    team *team = self->team;
    long seen = 0;
    pthread_mutex_lock(&team->lock);
    while (!team->stopping) {
        if (atomic_load(&team->job_number) == seen) {
            pthread_mutex_unlock(&team->lock);
            for (int i = 0; i < LOOKOUTS && atomic_load(&team->job_number) == seen; i++)
                pause_a_little();
            pthread_mutex_lock(&team->lock);
        }
        while (!team->stopping && atomic_load(&team->job_number) == seen)
            pthread_cond_wait(&team->posted, &team->lock);
        seen = atomic_load(&team->job_number);
        /* A helper that wakes too late finds nothing left and must not count as active: the caller may be gone. */
        if (team->stopping || atomic_load(&team->next_unit) >= team->num_units)
            continue;
        atomic_fetch_add(&team->active, 1);
        unit_function *function = team->function;
        void *job = team->job;
        int64_t num_units = team->num_units;
        pthread_mutex_unlock(&team->lock);
        claim_units(team, function, job, num_units, self->number);
        pthread_mutex_lock(&team->lock);
        if (atomic_fetch_sub(&team->active, 1) == 1)
            pthread_cond_signal(&team->finished);
    }
    pthread_mutex_unlock(&team->lock);
    return NULL;
}

/* NULL when the system gives no more threads or memory. */
EXPORT team *team_start(int size)
{
    team *team = calloc(1, sizeof(*team) + (size_t)size * sizeof(member));
    if (team == NULL)
        return NULL;
    pthread_mutex_init(&team->lock, NULL);
    pthread_cond_init(&team->posted, NULL);
    pthread_cond_init(&team->finished, NULL);
    for (team->size = 1; team->size < size; team->size++) {
        member *helper = &team->members[team->size];
        *helper = (member){.team = team, .number = team->size};
        if (pthread_create(&helper->thread, NULL, help, helper) != 0)
            break; /* A smaller team gives the same results. */
    }
    return team;
}

EXPORT void team_stop(team *team)
{
    pthread_mutex_lock(&team->lock);
    team->stopping = true;
    pthread_cond_broadcast(&team->posted);
    pthread_mutex_unlock(&team->lock);
    for (int i = 1; i < team->size; i++)
        pthread_join(team->members[i].thread, NULL);
    for (int i = 0; i < team->size; i++)
        free(team->members[i].scratch.memory);
    free(team->shared.memory);
    free(team->step.memory);
    free(team);
}

EXPORT int team_size(const team *team) { return team->size; }

void team_run(team *team, unit_function *function, void *job, int64_t num_units)
{
    if (team->size == 1 || num_units <= 1) {
        for (int64_t unit = 0; unit < num_units; unit++)
            function(job, unit, 0);
        return;
    }
    pthread_mutex_lock(&team->lock);
    team->function = function;
    team->job = job;
    team->num_units = num_units;
    atomic_store(&team->next_unit, 0);
    atomic_fetch_add(&team->job_number, 1);
    pthread_cond_broadcast(&team->posted);
    pthread_mutex_unlock(&team->lock);
    claim_units(team, function, job, num_units, 0);
    for (int i = 0; i < LOOKOUTS && atomic_load(&team->active) > 0; i++)
        pause_a_little();
    pthread_mutex_lock(&team->lock);
    while (atomic_load(&team->active) > 0)
        pthread_cond_wait(&team->finished, &team->lock);
    pthread_mutex_unlock(&team->lock);
}

static scratch *scratch_of(team *team, int number)
{
    switch (number) {
    case TEAM_SHARED:
        return &team->shared;
    case TEAM_STEP:
        return &team->step;
    default:
        return &team->members[number].scratch;
    }
}

void *team_scratch(team *team, int number, size_t bytes)
{
    scratch *scratch = scratch_of(team, number);
    if (scratch->bytes < bytes) {
        free(scratch->memory);
        scratch->bytes = (bytes + 4095) / 4096 * 4096;
        scratch->memory = aligned_alloc(64, scratch->bytes);
        if (scratch->memory == NULL)
            abort();
    }
    return scratch->memory;
}
