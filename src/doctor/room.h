// room.h: memory of the device under test, for those who run its ops on chosen inputs: taken piece by piece, given back
// all at once. Of the host it owns nothing.
#ifndef TANDEM_DOCTOR_ROOM_H
#define TANDEM_DOCTOR_ROOM_H

#include "model/model.h"

enum { ROOM_PIECES = 64 };

// All zero, but for the device, until something is taken.
struct room {
    struct device *device; // NULL: nothing is ever taken
    struct room_piece {
        unsigned char *memory;
        size_t bytes, used;
    } pieces[ROOM_PIECES];
    size_t n;
};

// Memory full of NaN; NULL when there is none.
void *room_take(struct room *r, size_t bytes, struct error *err);
// A copy of the host's bytes.
void *room_put(struct room *r, const void *from, size_t bytes, struct error *err);
// Everything that was taken is free again; the memory stays.
void room_empty(struct room *r);
void room_close(struct room *r);

// A batch's arrays on the device; placed->host is the batch.
bool room_put_batch(struct room *r, const struct batch *batch, struct batch *placed, struct error *err);
// A layer's pages, which the host has in kv_page.h's order, on the device in the device's; and back.
bool room_put_pages(struct room *r, const struct kv_layer *host, struct kv_layer *placed, struct error *err);
bool room_get_pages(struct room *r, const struct kv_layer *placed, struct kv_layer *host, struct error *err);

#endif
