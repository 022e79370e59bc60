/* Where Linux and macOS differ. */
#ifndef UVSOCK_COMPAT_H
#define UVSOCK_COMPAT_H

#include <errno.h>
#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#ifdef __linux__
#include <linux/sockios.h>
#endif

/* macOS has no MSG_NOSIGNAL; libuv sets SO_NOSIGPIPE on every stream socket it opens there. */
#ifndef MSG_NOSIGNAL
#define MSG_NOSIGNAL 0
#endif

/* macOS names the idle time before the first keep-alive probe differently. */
#ifndef TCP_KEEPIDLE
#ifdef TCP_KEEPALIVE
#define TCP_KEEPIDLE TCP_KEEPALIVE
#endif
#endif

/* The address of a peer that is gone, which getpeername(2) refuses. Linux only. */
#ifndef SO_PEERNAME
#define SO_PEERNAME -1
#endif

/* Bytes that were sent and the peer has not acknowledged (tcp(7); on macOS SO_NWRITE), or -1. */
static inline int uvs_unsent(int fd) {
    int n = -1;
#ifdef SIOCOUTQ
    if (ioctl(fd, SIOCOUTQ, &n) < 0)
        return -1;
#elif defined(SO_NWRITE)
    socklen_t size = sizeof(n);
    if (getsockopt(fd, SOL_SOCKET, SO_NWRITE, &n, &size) < 0)
        return -1;
#endif
    return n;
}

/* accept4(2), which macOS does not have. libuv makes the descriptor non-blocking. */
static inline int uvs_accept(int fd) {
#ifdef SOCK_CLOEXEC
    return accept4(fd, 0, 0, SOCK_CLOEXEC);
#else
    int accepted = accept(fd, 0, 0);
    if (accepted >= 0) fcntl(accepted, F_SETFD, FD_CLOEXEC);
    return accepted;
#endif
}

#endif
