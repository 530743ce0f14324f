/* A model and a step as step.c takes them. */

#pragma once

#include "attention.h"
#include "linear.h"

enum { ACTIVATION_SILU = 0, ACTIVATION_GELU = 1 };

/* One layer; mirrored by StepLayer in native_step.py. A norm that is not there is NULL. */
typedef struct {
    const float *input_norm, *q_norm, *k_norm, *attention_post_norm, *mlp_norm, *mlp_post_norm;
    linear_weight qkv, out, gate_up, down;
    const float *cos, *sin; /* (num_positions, head_dim / 2) */
    int64_t num_positions, activation;
    attention_numbers attention;
} step_layer;

/* A model; mirrored by StepModel in native_step.py. */
typedef struct {
    const float *embedding; /* (vocabulary, hidden) */
    int64_t vocabulary, hidden, num_layers;
    const step_layer *layers;
    float embedding_scale, epsilon;
} step_model;

/* One step; mirrored by Step in native_step.py. */
typedef struct {
    const int64_t *token_ids, *positions, *slots; /* (num_tokens) each */
    batch_places places;
    const kv_pool *pools; /* one a layer */
    float *to;            /* (num_tokens, hidden): what the layers before `first_layer` left, and what the last one leaves */
    int64_t first_layer, end_layer; /* to compute now; the embedding belongs to layer 0 */
} step;

enum { SOUND = 0, WRONG_TOKEN_ID, WRONG_POSITION, WRONG_SLOT, WRONG_ROW };

/* Returns SOUND, or what is wrong, and in `where` the first token or row of that kind; then nothing was read or written.
   Nothing but `to` and the pools goes from one range of layers to the next. */
int64_t run_step(team *team, const step_model *model, const step *step, int64_t *where);
