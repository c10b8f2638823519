/* A libnvidia-ml.so.1 that says what a file tells it: the tests compile it.
 *
 * NVML_STAND_IN names the file. A line is a key and a value: "gpus 2", "0.power 250000",
 * "0.mig0.uuid MIG-..", "0.processes 41:1048576 42:0" (ids and bytes). What the file does not have, the card does not support. "0.lost 1": that
 * GPU is gone. "0.error 999": all calls for it return that code. "1.xid 79 3": GPU 1 has had 3 events of Xid 79; each is told once. Values are in
 * NVML's own units. Calls of nvmlInit and nvmlShutdown are written to the file beside it, FILE.calls.
 * -DWITHOUT_ENERGY leaves functions out, as an old driver does, and has the older list of processes.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SUCCESS, NOT_SUPPORTED = 3, NOT_FOUND = 6, NO_DRIVER = 9, TIMEOUT = 10, IS_LOST = 15 };

/* a handle points to one of these: gpu * 8 + 0 for the GPU, + 1 + slot for a MIG device */
static char places[64];
static int told[8]; /* events of each GPU that were told */

static int look_up(const char *key, char *value, size_t size) {
  const char *path = getenv("NVML_STAND_IN");
  FILE *file = path ? fopen(path, "r") : NULL;
  char line[256];
  int found = 0;
  if (!file) return 0;
  while (!found && fgets(line, sizeof line, file)) {
    size_t length = strlen(key);
    if (strncmp(line, key, length) == 0 && line[length] == ' ') {
      line[strcspn(line, "\n")] = 0;
      snprintf(value, size, "%s", line + length + 1);
      found = 1;
    }
  }
  fclose(file);
  return found;
}

static void write_call(const char *name) {
  char path[512];
  FILE *file;
  snprintf(path, sizeof path, "%s.calls", getenv("NVML_STAND_IN"));
  if ((file = fopen(path, "a"))) {
    fprintf(file, "%s\n", name);
    fclose(file);
  }
}

static int text(void *handle, const char *name, char *value, size_t size) {
  int place = (char *)handle - places, gpu = place / 8, slot = place % 8 - 1;
  char key[64];
  snprintf(key, sizeof key, "%d.lost", gpu);
  if (look_up(key, value, size)) return IS_LOST;
  snprintf(key, sizeof key, "%d.error", gpu);
  if (look_up(key, value, size)) return atoi(value);
  if (slot < 0) snprintf(key, sizeof key, "%d.%s", gpu, name);
  else snprintf(key, sizeof key, "%d.mig%d.%s", gpu, slot, name);
  return look_up(key, value, size) ? SUCCESS : NOT_SUPPORTED;
}

static int number(void *handle, const char *name, unsigned long long *value) {
  char found[128];
  int code = text(handle, name, found, sizeof found);
  if (code == SUCCESS) *value = strtoull(found, NULL, 0);
  return code;
}

static int small(void *handle, const char *name, unsigned *value) {
  unsigned long long wide = 0;
  int code = number(handle, name, &wide);
  *value = wide;
  return code;
}

int nvmlInitWithFlags(unsigned flags) {
  char value[16];
  if (!look_up("gpus", value, sizeof value)) return NO_DRIVER;
  write_call("init");
  return SUCCESS;
}
int nvmlShutdown(void) { write_call("shutdown"); return SUCCESS; }
const char *nvmlErrorString(int code) { return code == NO_DRIVER ? "Driver Not Loaded" : "an error"; }
int nvmlDeviceGetCount_v2(unsigned *count) {
  char value[16];
  *count = look_up("gpus", value, sizeof value) ? atoi(value) : 0;
  return SUCCESS;
}
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle) { *handle = places + 8 * index; return SUCCESS; }
int nvmlDeviceGetName(void *handle, char *name, unsigned size) { return text(handle, "name", name, size); }
int nvmlDeviceGetUUID(void *handle, char *uuid, unsigned size) { return text(handle, "uuid", uuid, size); }
int nvmlDeviceGetMigMode(void *handle, unsigned *now, unsigned *pending) {
  *pending = 0;
  return small(handle, "mig", now);
}
int nvmlDeviceGetMaxMigDeviceCount(void *handle, unsigned *count) { *count = 7; return SUCCESS; }
int nvmlDeviceGetMigDeviceHandleByIndex(void *handle, unsigned index, void **device) {
  char value[128];
  *device = (char *)handle + 1 + index;
  return text(*device, "uuid", value, sizeof value) == SUCCESS ? SUCCESS : NOT_FOUND;
}
int nvmlDeviceGetUtilizationRates(void *handle, unsigned *rates) {
  int code = small(handle, "utilization", rates);
  return code ? code : small(handle, "memory_busy", rates + 1);
}
int nvmlDeviceGetMemoryInfo(void *handle, unsigned long long *memory) {
  int code = number(handle, "memory_total", memory);
  return code ? code : number(handle, "memory_used", memory + 2);
}
struct process { unsigned pid; unsigned long long bytes; unsigned gpu_instance, compute_instance; };
#ifdef WITHOUT_ENERGY
#define PROCESSES nvmlDeviceGetComputeRunningProcesses_v2
#else
#define PROCESSES nvmlDeviceGetComputeRunningProcesses_v3
#endif
int PROCESSES(void *handle, unsigned *count, struct process *processes) {
  char found[256], *at = found;
  unsigned room = *count;
  int code = text(handle, "processes", found, sizeof found);
  *count = 0;
  if (code) return code;
  for (struct process one = {0}; *at; at += strcspn(at, " "), at += strspn(at, " ")) {
    one.pid = strtoul(at, &at, 10);
    one.bytes = *at == ':' ? strtoull(at + 1, &at, 10) : 0;
    if (*count < room) processes[*count] = one;
    ++*count;
  }
  return *count > room ? 7 : SUCCESS; /* 7: the array is too small */
}
int nvmlDeviceGetPowerUsage(void *handle, unsigned *mw) { return small(handle, "power", mw); }
int nvmlDeviceGetTemperature(void *handle, int sensor, unsigned *c) { return small(handle, "temperature", c); }
int nvmlDeviceGetClockInfo(void *handle, int type, unsigned *mhz) {
  return small(handle, type == 1 ? "sm_clock" : type == 2 ? "memory_clock" : "other_clock", mhz);
}
int nvmlDeviceGetTotalEccErrors(void *handle, int type, int counter, unsigned long long *errors) {
  return type == 1 && counter == 0 ? number(handle, "ecc", errors) : NOT_SUPPORTED;
}
int nvmlDeviceGetPcieThroughput(void *handle, int counter, unsigned *kb_s) {
  return small(handle, counter == 0 ? "pcie_tx" : "pcie_rx", kb_s);
}
int nvmlDeviceGetCurrentClocksThrottleReasons(void *handle, unsigned long long *bits) {
  return number(handle, "throttle", bits);
}
#ifndef WITHOUT_ENERGY
int nvmlDeviceGetTotalEnergyConsumption(void *handle, unsigned long long *mj) {
  return number(handle, "energy", mj);
}
#endif

struct field_value {
  unsigned field, scope;
  long long timestamp, latency;
  int type, code;
  unsigned long long value;
};
int nvmlDeviceGetFieldValues(void *handle, int count, struct field_value *values) {
  for (int i = 0; i < count; i++)
    values[i].code = values[i].scope != 0xFFFFFFFFu ? NOT_SUPPORTED
        : number(handle, values[i].field == 138 ? "nvlink_tx" : "nvlink_rx", &values[i].value);
  return SUCCESS;
}

struct event { void *device; unsigned long long type, data; unsigned gpu_instance, compute_instance; };
static int registered[8];
int nvmlEventSetCreate(void **set) { *set = registered; return SUCCESS; }
int nvmlEventSetFree(void *set) { memset(registered, 0, sizeof registered); return SUCCESS; }
int nvmlDeviceRegisterEvents(void *handle, unsigned long long types, void *set) {
  registered[((char *)handle - places) / 8] = types == 8;
  return SUCCESS;
}
int nvmlEventSetWait_v2(void *set, struct event *event, unsigned timeout_ms) {
  for (int gpu = 0; gpu < 8; gpu++) {
    char value[32];
    int xid, times;
    if (registered[gpu] && text(places + 8 * gpu, "xid", value, sizeof value) == SUCCESS
        && sscanf(value, "%d %d", &xid, &times) == 2 && told[gpu] < times) {
      told[gpu]++;
      *event = (struct event){places + 8 * gpu, 8, xid, 0, 0};
      return SUCCESS;
    }
  }
  return TIMEOUT;
}
