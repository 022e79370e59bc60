/* Which descriptors are ready: epoll(7), or kqueue(2) where there is none, behind four functions. */
#ifndef UVSOCK_POLLER_H
#define UVSOCK_POLLER_H

/* As in _poller.pxd. */
enum { READY_READ = 2, READY_WRITE = 4, READY_HANGUP = 8, READY_BATCH = 256 };

typedef struct {
    void *who;
    int what;
} uvs_ready;

#if defined(__linux__) && !defined(UVSOCK_KQUEUE)

#include <sys/epoll.h>

static inline int uvs_poller_open(void) { return epoll_create1(EPOLL_CLOEXEC); }

/* Watch for other things than before; 0 is for nothing, not even the descriptor's hang-up. */
static inline int uvs_poller_set(int poller, int fd, int before, int what, void *who) {
    struct epoll_event event;
    int op = !before ? EPOLL_CTL_ADD : what ? EPOLL_CTL_MOD : EPOLL_CTL_DEL;
    event.events = (what & READY_READ ? EPOLLIN : 0) | (what & READY_WRITE ? EPOLLOUT : 0);
    event.data.ptr = who;
    return epoll_ctl(poller, op, fd, &event);
}

/* Take what is ready, without waiting: how many. */
static inline int uvs_poller_take(int poller, uvs_ready *ready) {
    struct epoll_event events[READY_BATCH];
    int i, n = epoll_wait(poller, events, READY_BATCH, 0);
    for (i = 0; i < n; i++) {
        uint32_t found = events[i].events;
        ready[i].who = events[i].data.ptr;
        ready[i].what = (found & EPOLLIN ? READY_READ : 0) | (found & EPOLLOUT ? READY_WRITE : 0) |
                        (found & (EPOLLERR | EPOLLHUP) ? READY_HANGUP : 0);
    }
    return n < 0 ? 0 : n;
}

#else

#include <fcntl.h>
#include <limits.h>
#include <string.h>
#include <sys/event.h>
#include <sys/types.h>

static inline int uvs_poller_open(void) {
    int poller = kqueue();
    if (poller >= 0)
        fcntl(poller, F_SETFD, FD_CLOEXEC);
    return poller;
}

static inline int uvs_poller_set(int poller, int fd, int before, int what, void *who) {
    struct kevent changes[2];
    int n = 0;
    /* A failure is heard by a filter for reading that data seldom satisfies, and then once. */
    if ((before & READY_READ) != (what & READY_READ) || !before != !what) {
        if (!what)
            EV_SET(&changes[n++], fd, EVFILT_READ, EV_DELETE, 0, 0, who);
        else if (what & READY_READ)
            EV_SET(&changes[n++], fd, EVFILT_READ, EV_ADD, NOTE_LOWAT, 1, who);
        else
            EV_SET(&changes[n++], fd, EVFILT_READ, EV_ADD | EV_CLEAR, NOTE_LOWAT, INT_MAX, who);
    }
    if ((before & READY_WRITE) != (what & READY_WRITE))
        EV_SET(&changes[n++], fd, EVFILT_WRITE, what & READY_WRITE ? EV_ADD : EV_DELETE, 0, 0, who);
    return n == 0 ? 0 : kevent(poller, changes, n, NULL, 0, NULL);
}

static inline int uvs_poller_take(int poller, uvs_ready *ready) {
    struct kevent events[READY_BATCH];
    struct timespec at_once;
    int i, n;
    memset(&at_once, 0, sizeof(at_once));
    n = kevent(poller, NULL, 0, events, READY_BATCH, &at_once);
    for (i = 0; i < n; i++) {
        ready[i].who = events[i].udata;
        ready[i].what = (events[i].filter == EVFILT_WRITE ? READY_WRITE : READY_READ) |
                        (events[i].flags & EV_EOF && events[i].fflags ? READY_HANGUP : 0);
    }
    return n < 0 ? 0 : n;
}

#endif
#endif
