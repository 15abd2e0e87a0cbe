/* Stands in for an engine on a real node: ready at once, on port 8001. Its flags say how its first start goes wrong:
   --seed=1 takes memory until it is killed, --seed=2 leaves a death certificate. /tmp outlives the container. */
#include <arpa/inet.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static void down(int signal_number) {
  (void)signal_number;
  _exit(0);
}

static int first_start(void) { return open("/tmp/started", O_CREAT | O_EXCL, 0600) >= 0; }

int main(int argc, char **argv) {
  int again = !first_start();
  for (int i = 1; i < argc && !again; i++) {
    if (!strcmp(argv[i], "--seed=1")) {
      for (;;) memset(malloc(1 << 20), 1, 1 << 20);
    }
    if (!strcmp(argv[i], "--seed=2")) {
      FILE *log = fopen("/dev/termination-log", "w");
      fputs("{\"code\":\"WEIGHTS_CORRUPT\",\"message\":\"model.safetensors is cut short.\",\"fix\":\"download it again\"}", log);
      fclose(log);
      return 23;
    }
  }
  signal(SIGTERM, down);
  signal(SIGPIPE, SIG_IGN);
  int on = 1, server = socket(AF_INET, SOCK_STREAM, 0);
  struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(8001)};
  setsockopt(server, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
  if (bind(server, (struct sockaddr *)&address, sizeof address) || listen(server, 64)) return 10;
  const char *body = "{\"stage\":\"ready\",\"load\":{\"running\":0,\"waiting\":0}}";
  char answer[512], question[4096];
  int length = snprintf(answer, sizeof answer,
                        "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %zu\r\n"
                        "Connection: close\r\n\r\n%s", strlen(body), body);
  for (;;) {
    int client = accept(server, 0, 0);
    if (client < 0) continue;
    if (read(client, question, sizeof question) > 0 && write(client, answer, length) < 0) perror("write");
    close(client);
  }
}
