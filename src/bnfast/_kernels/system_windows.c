#define WIN32_LEAN_AND_MEAN

#include "system.h"

#include <windows.h>

/* A page of the system's lies before the memory. */
#define HEAD ((size_t)4096)

/* Windows gives huge pages to nobody who has no privilege for them: where the memory begins is all the same. */
void *bn_map_memory(size_t bytes)
{
    char *begin = bytes > SIZE_MAX - HEAD
                      ? NULL
                      : VirtualAlloc(NULL, HEAD + bytes, MEM_RESERVE | MEM_COMMIT, PAGE_READWRITE);
    return begin == NULL ? NULL : begin + HEAD;
}

void bn_unmap_memory(void *memory, size_t bytes)
{
    (void)bytes;
    (void)VirtualFree((char *)memory - HEAD, 0, MEM_RELEASE);
}

void *bn_remap_memory(void *memory, size_t before, size_t bytes)
{
    (void)memory, (void)before, (void)bytes;
    return NULL;
}

size_t bn_allowed_processors(void)
{
    DWORD_PTR of_process, of_system;
    size_t processors = 0;
    if (GetProcessAffinityMask(GetCurrentProcess(), &of_process, &of_system)) {
        for (; of_process != 0; of_process &= of_process - 1) {
            processors++;
        }
    }
    return processors;
}

#ifdef _OPENMP

#include <stdlib.h>

const char *bn_file_of_code(const void *address)
{
    static char path[3 * MAX_PATH]; /* a character of UTF-16 has three bytes in UTF-8 at most */
    WCHAR wide[MAX_PATH];
    HMODULE module;
    if (!GetModuleHandleExW(GET_MODULE_HANDLE_EX_FLAG_FROM_ADDRESS | GET_MODULE_HANDLE_EX_FLAG_UNCHANGED_REFCOUNT,
                            address, &module)) {
        return NULL;
    }
    const DWORD length = GetModuleFileNameW(module, wide, MAX_PATH);
    const int is_whole = length > 0 && length < MAX_PATH;
    return is_whole && WideCharToMultiByte(CP_UTF8, 0, wide, -1, path, sizeof path, NULL, NULL) > 0 ? path : NULL;
}

void bn_at_fork(void (*in_child)(void)) { (void)in_child; /* Windows has no fork */ }

/* A thread waits here until all of the others have been started, too. */
static DWORD WINAPI wait_at(void *gate)
{
    AcquireSRWLockShared(gate);
    ReleaseSRWLockShared(gate);
    return 0;
}

int bn_try_threads(int wanted)
{
    SRWLOCK gate = SRWLOCK_INIT;
    HANDLE *threads = malloc((size_t)wanted * sizeof *threads);
    int started = 0;
    if (threads == NULL) {
        return 0;
    }
    AcquireSRWLockExclusive(&gate);
    while (started < wanted && (threads[started] = CreateThread(NULL, 0, wait_at, &gate, 0, NULL)) != NULL) {
        started++;
    }
    ReleaseSRWLockExclusive(&gate);
    for (int i = 0; i < started; i++) {
        (void)WaitForSingleObject(threads[i], INFINITE);
        (void)CloseHandle(threads[i]);
    }
    free(threads);
    return started;
}

uint64_t bn_time_passed(void)
{
    const uint64_t second = 1000000000u;
    LARGE_INTEGER ticks, per_second;
    (void)QueryPerformanceFrequency(&per_second);
    (void)QueryPerformanceCounter(&ticks);
    const uint64_t rate = (uint64_t)per_second.QuadPart, count = (uint64_t)ticks.QuadPart;
    return count / rate * second + count % rate * second / rate;
}

uint64_t bn_time_computed(void) { return bn_time_passed(); }

#endif
