// mistake.h: what sources see that sow.py has patched.
#ifndef TANDEM_TESTS_MISTAKE_H
#define TANDEM_TESTS_MISTAKE_H

#ifdef __cplusplus
extern "C" {
#endif
extern int emulator_mistake; // emulator.h
#ifdef __cplusplus
}
#endif

#define MISTAKE(n) (emulator_mistake == (n))

#endif
