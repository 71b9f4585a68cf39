#include "spectral_kv.h"

#include <stdio.h>
#include <stdlib.h>

int main(void) {
    enum { ROWS = 1000, D = 64 };
    static float q[ROWS][D], k[ROWS][D], v[ROWS][D], out[D];
    static int32_t positions[ROWS];
    for (int i = 0; i < ROWS; i++) {
        positions[i] = i;
        for (int j = 0; j < D; j++)
            q[i][j] = k[i][j] = v[i][j] = (float)rand() / (float)RAND_MAX;
    }

    skv_config config;
    skv_layer_shape shape;
    skv_rope rope; // as it is initialised: keys are not rotated
    skv_cache *cache = NULL;
    skv_config_init(&config, sizeof config);
    skv_layer_shape_init(&shape, sizeof shape);
    skv_rope_init(&rope, sizeof rope);
    config.n_cells = 4096;
    shape.n_head = shape.n_head_kv = 1;
    shape.d_k = shape.d_v = D;
    if (skv_cache_create(&config, &shape, &rope, 0.125f, 0.0f, NULL, &cache) != SKV_STATUS_OK ||
        skv_cache_append(cache, positions, ROWS, q[0], k[0], v[0]) != SKV_STATUS_OK ||
        skv_cache_attend(cache, q[ROWS - 1], 1, NULL, NULL, out) != SKV_STATUS_OK) {
        fprintf(stderr, "%s\n", skv_last_error());
        return 1;
    }
    printf("the first of %d elements: %f\n", D, out[0]);
    skv_cache_free(cache);
    return 0;
}
