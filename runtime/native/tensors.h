/* Opening a model: what plan.c asks of the table of tensors (tensors.c), for model.c to pack. */
#ifndef EDGEWRIGHT_TENSORS_H
#define EDGEWRIGHT_TENSORS_H

#include "core.h"

typedef struct { matrix *to; source from; } packing;

typedef struct {
    ew_model *model;
    const ew_tensor *table;                          /* [tensors] */
    int tensors, jobs, room;                         /* room: for jobs */
    int *slots, slot_count;                          /* 1 + index of a name in the table, by its hash; 0: none */
    size_t arena_bytes;
    packing *job;                                    /* [jobs] */
    char *error;                                     /* [256]; the first sentence stays */
    int packed, bad;                                 /* packed: the arena is; bad: 1 + a job of no finite numbers */
} opening;

/* tensors.c: those that give an int give 0, or -1 once `error` says why. */
int fail(opening *, const char *format, ...);
void *keep_or_fail(opening *, size_t bytes);
int check_table(opening *);
const ew_tensor *find(const opening *, const char *prefix, const char *suffix);      /* NULL: there is none */
int has_linear(const opening *, const char *name);                                  /* whether there is such a matrix */
/* A vector [n] or table (at least [n][columns]) of floats, kept as float32 [n][columns]. Absent: NULL if `optional`. */
int floats(opening *, float **to, const char *prefix, const char *suffix, int64_t n, int64_t columns, int optional);
/* Rows row0..row0+rows-1 of a linear (or table, by_input 0) of `total` rows: the shape of a matrix, and its source. */
int describe(opening *, matrix *, source *, const char *name, int rows, int inputs, int row0, int total, int by_input);
int plan_matrix(opening *, matrix *, const char *name, int rows, int inputs, int row0, int total, int by_input);

/* plan.c */
int check_config(opening *, const ew_config *);      /* and the sizes of model and layers that follow from it */
int plan_model(opening *);                           /* everything but the matrices' data */

#endif
