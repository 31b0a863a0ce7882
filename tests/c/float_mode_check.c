/* float_mode.h: what is found is left, and denormals are kept in between. */
#include "float_mode.h"

#include <stdio.h>

#if defined(__x86_64__)
#define FLUSHING (BN_DEFAULT_MODE | 0x8040)
#define DOWNWARD (BN_DEFAULT_MODE | 0x2000)
#elif defined(__aarch64__)
#define FLUSHING (UINT64_C(1) << 24)
#define DOWNWARD (UINT64_C(2) << 22)
#else
#define FLUSHING BN_DEFAULT_MODE
#define DOWNWARD BN_DEFAULT_MODE
#endif

static volatile float tiny = 1e-38f, hundred = 100.0f, one = 1.0f, small = 1e-9f;

/* Whether denormals are kept and sums are rounded to nearest, told from outside the optimizer's sight. */
static int is_default(void)
{
    const volatile float denormal = tiny / hundred, again = denormal * hundred, sum = one - small;
    return denormal > 0 && again > 0 && sum == 1.0f;
}

static int (*volatile in_mode)(void) = is_default;

int main(void)
{
    const bn_float_mode modes[] = {BN_DEFAULT_MODE, FLUSHING, DOWNWARD};
    for (int i = 0; i < 3; i++) {
        bn_write_float_mode(modes[i]);
        const int outside = in_mode();
        const bn_float_mode before = bn_enter_default_float_mode();
        const int inside = in_mode();
        const bn_float_mode nested = bn_enter_default_float_mode();
        bn_leave_default_float_mode(nested);
        const int still = in_mode();
        bn_leave_default_float_mode(before);
        const bn_float_mode after = bn_read_float_mode() & BN_MODE_BITS;
        bn_write_float_mode(BN_DEFAULT_MODE);
        if (outside != (modes[i] == BN_DEFAULT_MODE) || !inside || !still || after != modes[i]) {
            printf("mode %d: outside %d, inside %d, then %d, left %llx\n", i, outside, inside, still,
                   (unsigned long long)after);
            return 1;
        }
    }
    return 0;
}
