/* A team of threads that share one op's work. See threads.c for how. */

#pragma once

#include <stddef.h>
#include <stdint.h>

typedef struct team team;

/* Does unit `unit` of a job; `member` (0: the caller) says whose scratch memory it may use. */
typedef void unit_function(void *job, int64_t unit, int member);

/* Runs every unit once, in any order, and returns when all are done. One caller at a time. */
void team_run(team *team, unit_function *function, void *job, int64_t num_units);

int team_size(const team *team);

/* Memory that lives as long as the team: 64-byte aligned, at least `bytes` long, content lost when it grows. `member`
   has its own; TEAM_SHARED is the caller's, to be filled before team_run() and read by all; TEAM_STEP is for what lives
   longer than one op. Out of memory: abort(). */
#define TEAM_SHARED (-1)
#define TEAM_STEP (-2)
void *team_scratch(team *team, int member, size_t bytes);
