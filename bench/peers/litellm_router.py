"""The LiteLLM Router inside one's own program: asyncio with a semaphore, a deployment a key."""

import asyncio

import litellm
import litellm_settings
import peer


async def ask_all(told: peer.Told) -> peer.Done:
    litellm.telemetry = False
    litellm.suppress_debug_info = True
    router = litellm.Router(
        model_list=litellm_settings.deployments(told), **litellm_settings.router_settings(told)
    )
    places = asyncio.Semaphore(told.in_flight)
    done = peer.Done()

    async def ask(task_id: str, text: str) -> None:
        async with places:
            for _ in range(peer.TRIES):
                try:
                    reply = await router.acompletion(model=told.model, messages=told.messages(text))
                    done.answers[task_id] = reply.choices[0].message.content
                    return
                except Exception as error:  # it raises its own, openai's and bare ones
                    done.errors[task_id] = type(error).__name__

    # What it imports on the first call is not its pace; this call goes nowhere.
    await router.acompletion(model=told.model, messages=told.messages("warm up"), mock_response="ready")
    done.begin()
    await asyncio.gather(*(ask(task_id, text) for task_id, text in told.tasks.items()))
    done.end()
    return done


peer.main(lambda told: asyncio.run(ask_all(told)))
