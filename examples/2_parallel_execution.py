"""Run calls in parallel: a few with `&`, many with `gather`, an endless number as a stream."""

from __future__ import annotations

import skyward as sky


@sky.compute
def is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))


@sky.compute
def count(text: str) -> int:
    return len(text.split())


@sky.pool(nodes=2, concurrency=2)
def main() -> None:
    # Each result has its own type: (bool, int).
    prime, words = (is_prime(2_147_483_647) & count("to be or not to be")) >> sky
    print(f"prime: {prime}, words: {words}")

    found = sky.gather(*(is_prime(n) for n in range(1000))) >> sky
    print(f"primes below 1000: {sum(found)}")

    # Taken from the generator as slots get free, and handed out as they are done.
    calls = (is_prime(n) for n in range(100_000))
    print(f"primes below 100000: {sum(sky.gather(calls, stream=True, ordered=False) >> sky)}")


if __name__ == "__main__":
    main()
