/* What sample.c offers to a whole step in one call; see decode.c. */

#pragma once

#include "threads.h"

/* Where the largest number of each row of x (num_rows, width) is, of equals the first. */
void argmax(team *team, const float *x, int64_t num_rows, int64_t width, int64_t *ids);
