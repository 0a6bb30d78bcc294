// bridge.h: a device's ops as ops on the host's memory: each call copies its inputs to the device, runs the one op
// there, waits for it, and copies its results back. What walks through a step on the host (diagnose_walk.h) so examines
// a device, one op at a time. Only for one thread; slow.
#ifndef TANDEM_DOCTOR_BRIDGE_H
#define TANDEM_DOCTOR_BRIDGE_H

#include "model/model.h"

struct bridge;

// `weights`: the model's on the ops' device. Ops are handed the model's own matrices, in host memory.
struct bridge *bridge_create(const struct ops *ops, const struct model *model, const struct device_weights *weights,
                             struct error *err);
void bridge_free(struct bridge *b); // NULL is fine

// The table: device NULL, the name the device's.
const struct ops *bridge_ops(struct bridge *b);

// False, and why, when a call could not be carried out: then its results are whatever stood there.
bool bridge_error(const struct bridge *b, struct error *err);

#endif
