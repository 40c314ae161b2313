"""Run Alembic's migrations in the transaction that the caller has begun (database.py).

Responsible for: passing on the caller's connection. Not responsible for: the steps (versions/).
"""

from alembic import context

from dovetail.data.labels.schema import Table

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Table.metadata,
    transactional_ddl=True,
    render_as_batch=True,
)
context.run_migrations()
