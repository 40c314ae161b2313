"""What Alembic runs: migrations in the transaction that the caller has begun (database.py).

Responsible for: handing the caller's connection on. Not responsible for: the steps (versions/).
"""

from alembic import context

from dovetail.preferences.schema import Table

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Table.metadata,
    transactional_ddl=True,
    render_as_batch=True,
)
context.run_migrations()
