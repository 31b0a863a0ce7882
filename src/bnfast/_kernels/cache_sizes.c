/* Linux: sysfs, which knows what the C library's sysconf gets wrong on machines with several last-level
   caches (it reports their sum). macOS: sysctl. Windows: the list of its processors' caches. */
#include "cache_sizes.h"

#include <stdio.h>
#include <string.h>

#if defined(__APPLE__)
#include <sys/sysctl.h>
#elif defined(_WIN32)
#define WIN32_LEAN_AND_MEAN
#include <stdlib.h>
#include <windows.h>
#endif

#define COMMON_LEVEL2 ((size_t)512 << 10)
#define COMMON_LAST_LEVEL ((size_t)8 << 20)

#if defined(__linux__)

#define FOLDER "/sys/devices/system/cpu/cpu0/cache/index%d/%s"
#define CACHES 8

/* One line of one of the files of cache `index`; 0 where there is none. */
static int read_line(int index, const char *name, char *line, int size)
{
    char path[96];
    snprintf(path, sizeof path, FOLDER, index, name);
    FILE *file = fopen(path, "r");
    if (file == NULL) {
        return 0;
    }
    const int read = fgets(line, size, file) != NULL;
    fclose(file);
    return read;
}

static void ask_system(bn_caches *caches)
{
    char line[32];
    int last_level = 0;
    for (int index = 0; index < CACHES; index++) {
        int level;
        size_t kib;
        if (!read_line(index, "level", line, sizeof line) || sscanf(line, "%d", &level) != 1 ||
            !read_line(index, "type", line, sizeof line) || strncmp(line, "Instruction", 11) == 0 ||
            !read_line(index, "size", line, sizeof line) || sscanf(line, "%zuK", &kib) != 1) {
            continue;
        }
        if (level == 2) {
            caches->level2 = kib << 10;
        }
        if (level > last_level) {
            last_level = level;
            caches->last_level = kib << 10;
        }
    }
}

#elif defined(__APPLE__)

static size_t setting(const char *name)
{
    size_t value = 0, size = sizeof value;
    return sysctlbyname(name, &value, &size, NULL, 0) == 0 ? value : 0;
}

static void ask_system(bn_caches *caches)
{
    caches->level2 = setting("hw.l2cachesize");
    const size_t level3 = setting("hw.l3cachesize");
    caches->last_level = level3 ? level3 : caches->level2;
}

#elif defined(_WIN32)

static void ask_system(bn_caches *caches)
{
    DWORD bytes = 0;
    int last_level = 0;
    (void)GetLogicalProcessorInformation(NULL, &bytes);
    SYSTEM_LOGICAL_PROCESSOR_INFORMATION *list = malloc(bytes);
    const DWORD count = list != NULL && GetLogicalProcessorInformation(list, &bytes) ? bytes / sizeof *list : 0;
    for (DWORD i = 0; i < count; i++) {
        const CACHE_DESCRIPTOR *cache = &list[i].Cache;
        if (list[i].Relationship != RelationCache || cache->Type == CacheInstruction) {
            continue;
        }
        if (cache->Level == 2 && caches->level2 == 0) {
            caches->level2 = cache->Size;
        }
        if (cache->Level > last_level) {
            last_level = cache->Level;
            caches->last_level = cache->Size;
        }
    }
    free(list);
}

#else

static void ask_system(bn_caches *caches) { (void)caches; }

#endif

bn_caches bn_cache_sizes(void)
{
    bn_caches caches = {0, 0};
    ask_system(&caches);
    if (caches.level2 == 0) {
        caches.level2 = COMMON_LEVEL2;
    }
    if (caches.last_level == 0) {
        caches.last_level = COMMON_LAST_LEVEL;
    }
    return caches;
}
