// clock.h: monotonic time.
#ifndef TANDEM_BASE_CLOCK_H
#define TANDEM_BASE_CLOCK_H

// Seconds since an arbitrary start; never goes back.
double clock_seconds(void);

#endif
