// sandbox.h: what the process may still ask of the kernel once the server serves: memory, time, the sockets that it has
// and accepts, and reading the key file. A request that got hold of the process could start no program, open no
// connection and write no file.
#ifndef TANDEM_SERVER_SANDBOX_H
#define TANDEM_SERVER_SANDBOX_H

#include "base/error.h"

#include <stdbool.h>

// Puts every thread of the process into the sandbox, for good: threads must not be started afterwards. What is not
// allowed fails with EPERM. `reads_files`: files may be opened for reading. False with the reason: nothing changed but
// that the process cannot gain privileges any more.
bool sandbox_enter(bool reads_files, struct error *err);

#endif
