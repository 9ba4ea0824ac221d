/* The limit: takes COUNT messages from a queue with rabbitmq-c and throws them away, or publishes COUNT copies of the
 * message in FILE with confirms: the length of its properties in four octets, the properties, the body.
 * Like measure.py, it says when it is ready, waits for a line, and prints what it took as JSON. */

#include <amqp.h>
#include <amqp_tcp_socket.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>

enum { CHANNEL = 1, FRAME_MAX = 131072, PREFETCH = 2000, ACKNOWLEDGE_EVERY = 500, WINDOW = 20000 };

static void die(const char *what) {
    fprintf(stderr, "limit: %s\n", what);
    exit(1);
}

static void check(amqp_rpc_reply_t reply, const char *what) {
    if (reply.reply_type != AMQP_RESPONSE_NORMAL) die(what);
}

static double cpu(void) {
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    return usage.ru_utime.tv_sec + usage.ru_stime.tv_sec + (usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) / 1e6;
}

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + time.tv_nsec / 1e9;
}

/* A line of /proc/self/status in MB: ru_maxrss would be that of the process that has started this one. */
static double memory(const char *name) {
    char line[256];
    long kilobytes = 0;
    FILE *status = fopen("/proc/self/status", "r");
    if (!status) die("cannot read /proc/self/status");
    while (fgets(line, sizeof line, status))
        if (strncmp(line, name, strlen(name)) == 0) kilobytes = atol(line + strlen(name));
    fclose(status);
    return kilobytes / 1024.0;
}

/* Frames are taken as they come, without putting messages together: nothing of a message is looked at but its size. */
static void take(amqp_connection_state_t connection, long count, int acknowledge) {
    uint64_t tag = 0, left = 0;
    long taken = 0;
    while (taken < count) {
        amqp_frame_t frame;
        amqp_maybe_release_buffers(connection);
        if (amqp_simple_wait_frame(connection, &frame) != AMQP_STATUS_OK) die("cannot read");
        if (frame.frame_type == AMQP_FRAME_METHOD) {
            if (frame.payload.method.id != AMQP_BASIC_DELIVER_METHOD) die("an unexpected method");
            tag = ((amqp_basic_deliver_t *)frame.payload.method.decoded)->delivery_tag;
            continue;
        }
        if (frame.frame_type == AMQP_FRAME_HEADER)
            left = frame.payload.properties.body_size;
        else
            left -= frame.payload.body_fragment.len;
        if (left > 0) continue;
        taken++;
        if (acknowledge && (taken % ACKNOWLEDGE_EVERY == 0 || taken == count))
            amqp_basic_ack(connection, CHANNEL, tag, 1);
    }
}

static amqp_bytes_t read_file(const char *name) {
    FILE *file = fopen(name, "rb");
    if (!file) die("cannot open the file");
    amqp_bytes_t bytes = amqp_bytes_malloc(1 << 20);
    bytes.len = fread(bytes.bytes, 1, bytes.len, file);
    fclose(file);
    return bytes;
}

/* Waits until all of a window is confirmed: single confirms may come out of order. */
static void confirm(amqp_connection_state_t connection, uint64_t first, uint64_t last) {
    static char confirmed[WINDOW];
    long left = last - first + 1;
    memset(confirmed, 0, sizeof confirmed);
    while (left > 0) {
        amqp_frame_t frame;
        amqp_maybe_release_buffers(connection);
        if (amqp_simple_wait_frame(connection, &frame) != AMQP_STATUS_OK) die("cannot read");
        if (frame.frame_type != AMQP_FRAME_METHOD || frame.payload.method.id != AMQP_BASIC_ACK_METHOD)
            die("an unexpected frame");
        amqp_basic_ack_t *ack = frame.payload.method.decoded;
        for (uint64_t tag = ack->multiple ? first : ack->delivery_tag; tag <= ack->delivery_tag; tag++)
            if (!confirmed[tag - first]) confirmed[tag - first] = 1, left--;
    }
}

static void publish(amqp_connection_state_t connection, const char *queue, long count, amqp_bytes_t message) {
    const unsigned char *octets = message.bytes;
    size_t size = (size_t)octets[0] << 24 | octets[1] << 16 | octets[2] << 8 | octets[3];
    amqp_bytes_t encoded = {size, (char *)message.bytes + 4};
    amqp_bytes_t body = {message.len - 4 - size, (char *)message.bytes + 4 + size};
    amqp_pool_t pool;
    void *properties;
    init_amqp_pool(&pool, 4096);
    if (amqp_decode_properties(AMQP_BASIC_CLASS, &pool, encoded, &properties) < 0) die("unreadable properties");
    for (long sent = 0; sent < count;) {
        long window = count - sent < WINDOW ? count - sent : WINDOW;
        for (long i = 0; i < window; i++)
            if (amqp_basic_publish(connection, CHANNEL, amqp_empty_bytes, amqp_cstring_bytes(queue), 0, 0, properties, body))
                die("cannot publish");
        confirm(connection, sent + 1, sent + window);
        sent += window;
    }
    empty_amqp_pool(&pool);
}

int main(int argc, char **argv) {
    if (argc != 5 && argc != 6) die("usage: limit PORT QUEUE COUNT no-ack|ack|publish [FILE]");
    long count = atol(argv[3]);
    int acknowledge = strcmp(argv[4], "ack") == 0, publishes = strcmp(argv[4], "publish") == 0;
    amqp_bytes_t message = publishes ? read_file(argv[5]) : amqp_empty_bytes;

    amqp_connection_state_t connection = amqp_new_connection();
    amqp_socket_t *socket = amqp_tcp_socket_new(connection);
    if (!socket || amqp_socket_open(socket, "127.0.0.1", atoi(argv[1]))) die("cannot connect");
    check(amqp_login(connection, "/", 0, FRAME_MAX, 0, AMQP_SASL_METHOD_PLAIN, "guest", "guest"), "cannot log in");
    amqp_channel_open(connection, CHANNEL);
    check(amqp_get_rpc_reply(connection), "cannot open a channel");
    if (acknowledge) {
        amqp_basic_qos(connection, CHANNEL, 0, PREFETCH, 0);
        check(amqp_get_rpc_reply(connection), "cannot set the prefetch");
    }

    if (publishes) {
        amqp_confirm_select(connection, CHANNEL);
        check(amqp_get_rpc_reply(connection), "cannot have messages confirmed");
    }

    puts("ready");
    fflush(stdout);
    if (getchar() == EOF) die("nobody is there");

    double before = memory("VmRSS:"), start = now(), used = cpu();
    if (publishes) {
        publish(connection, argv[2], count, message);
    } else {
        amqp_basic_consume(
            connection, CHANNEL, amqp_cstring_bytes(argv[2]), amqp_empty_bytes, 0, !acknowledge, 0, amqp_empty_table);
        check(amqp_get_rpc_reply(connection), "cannot consume");
        take(connection, count, acknowledge);
    }
    used = cpu() - used;
    start = now() - start;
    double peak = memory("VmHWM:");
    printf(
        "{\"count\": %ld, \"cpu\": %f, \"wall\": %f, \"peak\": %f, \"growth\": %f}\n", count, used, start, peak,
        peak - before);
    fflush(stdout);
    amqp_connection_close(connection, AMQP_REPLY_SUCCESS);
    amqp_destroy_connection(connection);
    return 0;
}
