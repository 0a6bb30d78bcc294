// choose.c: sows the seed that the environment names, in the program `make build/tests/doctor/tandem-seeded` links: the
// product's command line with broken functions below it. Its output is docs/DOCTOR.md's.
#include "seeded.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

__attribute__((constructor)) static void choose(void) {
    const char *name = getenv("TANDEM_SEED");
    for (size_t i = 0; name && i < n_seeds; i++)
        if (strcmp(seeds[i].name, name) == 0) sown = &seeds[i];
    if (name && !sown) fprintf(stderr, "no such seed: %s\n", name);
}
