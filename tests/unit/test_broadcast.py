import asyncio
import threading

from autotune.service.broadcast import Broadcast


def test_what_happens_between_looking_and_waiting_is_not_missed() -> None:
    broadcast = Broadcast()
    ticket = broadcast.ticket("jobs")
    broadcast.publish("jobs")
    assert asyncio.run(broadcast.changed(ticket, timeout_s=60))


def test_a_topic_wakes_its_own_waiters_only() -> None:
    broadcast = Broadcast()

    async def wait() -> list[bool]:
        jobs, trials = broadcast.ticket("jobs"), broadcast.ticket("trials")
        waiting = [
            asyncio.create_task(broadcast.changed(ticket, timeout_s=0.2))
            for ticket in (jobs, trials)
        ]
        await asyncio.sleep(0)
        broadcast.publish("trials")
        return await asyncio.gather(*waiting)

    assert asyncio.run(wait()) == [False, True]


def test_another_thread_wakes_every_waiter() -> None:
    broadcast = Broadcast()

    async def wait() -> list[bool]:
        ticket = broadcast.ticket("measurements")
        waiting = [asyncio.create_task(broadcast.changed(ticket, timeout_s=60)) for _ in range(50)]
        await asyncio.sleep(0)
        threading.Thread(target=broadcast.publish, args=("measurements",)).start()
        return await asyncio.gather(*waiting)

    assert asyncio.run(wait()) == [True] * 50


def test_closing_wakes_everyone_now_and_later() -> None:
    broadcast = Broadcast()

    async def wait() -> bool:
        ended = asyncio.create_task(broadcast.closed())
        await asyncio.sleep(0)
        broadcast.close()
        await ended
        return await broadcast.changed(broadcast.ticket("jobs"), timeout_s=60)

    assert asyncio.run(wait())
    assert broadcast.is_closed


def test_a_cancelled_waiter_leaves_nothing_behind() -> None:
    broadcast = Broadcast()

    async def wait() -> None:
        task = asyncio.create_task(broadcast.changed(broadcast.ticket("jobs"), timeout_s=60))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(wait())
    broadcast.publish("jobs")
    assert not broadcast._waiting
    assert not broadcast._by_topic


def test_a_waiter_whose_loop_is_gone_does_not_stop_the_publisher() -> None:
    broadcast = Broadcast()
    loop = asyncio.new_event_loop()
    task = loop.create_task(broadcast.changed(broadcast.ticket("jobs"), timeout_s=60))
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    heard: list[str] = []
    broadcast.listen(heard.append)
    broadcast.publish("jobs")
    assert heard == ["jobs"]
    task.get_coro().close()  # type: ignore[union-attr]  # it never ends by itself
    task._log_destroy_pending = False  # type: ignore[attr-defined]
