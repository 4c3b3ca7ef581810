/* A libnvidia-ml that says what a text file tells it to, for tests of the real nvml-wrapper path.
 *
 *   gcc -shared -fPIC -O1 -o libfake-nvml.so fake_nvml.c
 *
 * The file is $FAKE_NVML_STATE, or `<path of this library>.state`, and is read anew on each call.
 * Replace it whole (write another file, then rename). Sizes are MiB, times milliseconds; words are
 * separated by single spaces, nothing else by anything but a newline:
 *
 *   count 2                    GPUs; the lines below default to 24576 MiB each, all of it free
 *   driver 550.54.15
 *   init 9                     nvmlInit_v2 returns this (9 driver not loaded, 18 version mismatch)
 *   fail 999                   every other call returns this (999: Unknown Error, 15: GPU lost)
 *   hang_ms 8000               every call takes this long
 *   gpu 0 total 24576 used 100 reserved 300 mig 0 util 42
 *                              `used` beside what the processes below hold
 *   uuid 0 GPU-other           another identity
 *   process 0 4711 12000       GPU 0: pid 4711 is listed with 12000 MiB, whether it lives or not
 *   graphics 0 4711 12000      the same in the list of graphics processes (counted once in bytes)
 *   engine 0 4711 12000 2000   like `process` while pid 4711 lives; once it is dead it is listed no
 *                              more, but its bytes stay used for 2000 ms (-1: for ever)
 *   ledger /dir 2000           like `engine` for every entry `<pid>.json` of a folder in which
 *                              stand-in engines declare their memory (WHARF_VRAM_LEDGER)
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define GPUS 16
#define PROCS 64
#define DEAD 1024
#define MIB (1ull << 20)
#define INSUFFICIENT_SIZE 7

typedef struct dev { int i; } *device;
typedef struct { unsigned long long total, free, used; } mem1;
typedef struct { unsigned version; unsigned long long total, reserved, free, used; } mem2;
typedef struct { unsigned pid; unsigned long long used; unsigned gi, ci; } proc;
typedef struct { unsigned gpu, memory; } util;

static struct dev devices[GPUS];
static struct { long pid; long long since; } dead[DEAD];
static int dead_count;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

typedef struct {
    int count, init, fail, hang_ms;
    char driver[64];
    struct {
        long long total, used, reserved;
        int mig, util, listed, graphics;
        char uuid[80];
        proc list[PROCS], graphic[PROCS];
    } gpu[GPUS];
} state;

static long long now_ms(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000ll + t.tv_nsec / 1000000;
}

/* Gone, or a zombie. `ticks` 0: any process of that pid. */
static int is_dead(long pid, unsigned long long ticks) {
    char path[64], text[1024], status = 0;
    snprintf(path, sizeof path, "/proc/%ld/stat", pid);
    FILE *file = fopen(path, "r");
    if (!file) return 1;
    size_t n = fread(text, 1, sizeof text - 1, file);
    fclose(file);
    text[n] = 0;
    char *rest = strrchr(text, ')');
    unsigned long long started = 0;
    if (!rest) return 1;
    sscanf(rest + 2, "%c %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %llu",
           &status, &started);
    return status == 'Z' || status == 'X' || (ticks && ticks != started);
}

static long long dead_for(long pid) {
    for (int i = 0; i < dead_count; i++)
        if (dead[i].pid == pid) return now_ms() - dead[i].since;
    if (dead_count < DEAD) {
        dead[dead_count].pid = pid;
        dead[dead_count++].since = now_ms();
    }
    return 0;
}

static void listed(state *s, int g, long pid, long long mib) {
    if (g < 0 || g >= GPUS || s->gpu[g].listed >= PROCS) return;
    proc *p = &s->gpu[g].list[s->gpu[g].listed++];
    p->pid = pid, p->used = mib * MIB, p->gi = p->ci = 0xffffffff;
    s->gpu[g].used += mib;
}

static void engine(state *s, int g, long pid, unsigned long long ticks, long long mib, long linger) {
    if (g < 0 || g >= GPUS) return;
    if (!is_dead(pid, ticks)) listed(s, g, pid, mib);
    else if (linger < 0 || dead_for(pid) < linger) s->gpu[g].used += mib;
}

/* {"pid":1,"start_ticks":2,"gpus":[0,1],"bytes":3,…} */
static void ledger_entry(state *s, const char *path, long linger) {
    char text[4096];
    FILE *file = fopen(path, "r");
    if (!file) return;
    size_t n = fread(text, 1, sizeof text - 1, file);
    fclose(file);
    text[n] = 0;
    char *pid = strstr(text, "\"pid\":"), *ticks = strstr(text, "\"start_ticks\":");
    char *gpus = strstr(text, "\"gpus\":["), *bytes = strstr(text, "\"bytes\":");
    if (!pid || !ticks || !gpus || !bytes) return;
    for (char *at = gpus + 8; *at && *at != ']';) {
        char *end;
        long g = strtol(at, &end, 10);
        if (end == at) break;
        engine(s, g, atol(pid + 6), strtoull(ticks + 14, 0, 10), atoll(bytes + 8) / MIB, linger);
        at = *end == ',' ? end + 1 : end;
    }
}

static void ledger(state *s, const char *folder, long linger) {
    DIR *dir = opendir(folder);
    if (!dir) return;
    for (struct dirent *e; (e = readdir(dir));) {
        size_t n = strlen(e->d_name);
        char path[4096];
        if (n < 5 || strcmp(e->d_name + n - 5, ".json")) continue;
        snprintf(path, sizeof path, "%s/%s", folder, e->d_name);
        ledger_entry(s, path, linger);
    }
    closedir(dir);
}

static void line(state *s, const char *text) {
    int g = 0, mig = 0, percent = 0;
    long pid, linger;
    long long total, used, reserved, mib;
    char word[1024];
    sscanf(text, "count %d", &s->count);
    sscanf(text, "driver %63s", s->driver);
    sscanf(text, "init %d", &s->init);
    sscanf(text, "fail %d", &s->fail);
    sscanf(text, "hang_ms %d", &s->hang_ms);
    int n = sscanf(text, "gpu %d total %lld used %lld reserved %lld mig %d util %d", &g, &total,
                   &used, &reserved, &mig, &percent);
    if (n >= 4 && g >= 0 && g < GPUS) {
        s->gpu[g].total = total, s->gpu[g].used += used, s->gpu[g].reserved = reserved;
        s->gpu[g].mig = mig, s->gpu[g].util = percent;
    }
    if (sscanf(text, "uuid %d %79s", &g, word) == 2 && g >= 0 && g < GPUS)
        strcpy(s->gpu[g].uuid, word);
    if (sscanf(text, "process %d %ld %lld", &g, &pid, &mib) == 3) listed(s, g, pid, mib);
    if (sscanf(text, "graphics %d %ld %lld", &g, &pid, &mib) == 3 && g >= 0 && g < GPUS &&
        s->gpu[g].graphics < PROCS) {
        proc *p = &s->gpu[g].graphic[s->gpu[g].graphics++];
        p->pid = pid, p->used = mib * MIB, p->gi = p->ci = 0xffffffff;
    }
    if (sscanf(text, "engine %d %ld %lld %ld", &g, &pid, &mib, &linger) == 4)
        engine(s, g, pid, 0, mib, linger);
    if (sscanf(text, "ledger %1023s %ld", word, &linger) == 2) ledger(s, word, linger);
}

/* Also waits for hang_ms. */
static state *load(void) {
    static __thread state s;
    char path[4096], text[4096];
    const char *given = getenv("FAKE_NVML_STATE");
    Dl_info self;
    memset(&s, 0, sizeof s);
    s.count = 1;
    strcpy(s.driver, "550.54.15");
    for (int g = 0; g < GPUS; g++) {
        devices[g].i = g;
        s.gpu[g].total = 24576;
        snprintf(s.gpu[g].uuid, sizeof s.gpu[g].uuid, "GPU-00000000-0000-0000-0000-%012d", g);
    }
    if (given) snprintf(path, sizeof path, "%s", given);
    else if (dladdr((void *)load, &self)) snprintf(path, sizeof path, "%s.state", self.dli_fname);
    else return &s;
    pthread_mutex_lock(&lock);
    FILE *file = fopen(path, "r");
    while (file && fgets(text, sizeof text, file)) line(&s, text);
    if (file) fclose(file);
    pthread_mutex_unlock(&lock);
    if (s.count > GPUS) s.count = GPUS;
    if (s.hang_ms > 0) usleep(s.hang_ms * 1000u);
    return &s;
}

#define LOAD state *s = load(); if (s->fail) return s->fail

int nvmlInit_v2(void) { return load()->init; }
int nvmlShutdown(void) { return 0; }
const char *nvmlErrorString(int r) { return r ? "Fake error" : "Success"; }
int nvmlSystemGetDriverVersion(char *b, unsigned l) { LOAD; snprintf(b, l, "%s", s->driver); return 0; }
int nvmlDeviceGetCount_v2(unsigned *c) { LOAD; *c = s->count; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned i, device *d) {
    LOAD;
    if ((int)i >= s->count) return 2;
    *d = &devices[i];
    return 0;
}
int nvmlDeviceGetName(device d, char *b, unsigned l) { LOAD; snprintf(b, l, "Fake GPU %d", d->i); return 0; }
int nvmlDeviceGetUUID(device d, char *b, unsigned l) { LOAD; snprintf(b, l, "%s", s->gpu[d->i].uuid); return 0; }
int nvmlDeviceGetMigMode(device d, unsigned *now, unsigned *pending) {
    LOAD;
    *now = *pending = s->gpu[d->i].mig;
    return 0;
}
int nvmlDeviceGetMemoryInfo_v2(device d, mem2 *m) {
    LOAD;
    m->total = s->gpu[d->i].total * MIB;
    m->reserved = s->gpu[d->i].reserved * MIB;
    m->used = s->gpu[d->i].used * MIB;
    unsigned long long taken = m->used + m->reserved;
    m->free = taken < m->total ? m->total - taken : 0;
    return 0;
}
int nvmlDeviceGetMemoryInfo(device d, mem1 *m) {
    mem2 two = {0};
    int r = nvmlDeviceGetMemoryInfo_v2(d, &two);
    m->total = two.total, m->free = two.free, m->used = two.used + two.reserved;
    return r;
}
static int list(unsigned *c, proc *out, const proc *from, unsigned have) {
    if (*c < have) { *c = have; return INSUFFICIENT_SIZE; }
    *c = have;
    if (have) memcpy(out, from, have * sizeof *from);
    return 0;
}
int nvmlDeviceGetComputeRunningProcesses_v3(device d, unsigned *c, proc *p) {
    LOAD;
    return list(c, p, s->gpu[d->i].list, s->gpu[d->i].listed);
}
int nvmlDeviceGetGraphicsRunningProcesses_v3(device d, unsigned *c, proc *p) {
    LOAD;
    return list(c, p, s->gpu[d->i].graphic, s->gpu[d->i].graphics);
}
int nvmlDeviceGetUtilizationRates(device d, util *u) { LOAD; u->gpu = s->gpu[d->i].util; u->memory = 0; return 0; }
